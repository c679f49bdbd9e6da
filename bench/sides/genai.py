"""OpenVINO GenAI's continuous-batching pipeline, fed from a closed loop of users."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import msgspec

from bench.sides.prompts import texts, token_ids
from bench.turns import answer_in_turn, own_stdout
from headrace.types import ModelFiles


def closed_loop(pipeline: Any, prompts: list[list[int]], *, users: int, max_tokens: int, first_id: int) -> tuple[int, float]:
    """Output tokens and seconds of all prompts, `users` at a time, greedy and to the last token."""
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig(max_new_tokens=max_tokens, ignore_eos=True, do_sample=False)
    inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    turn = iter(enumerate(inputs))
    finished = openvino_genai.py_openvino_genai.GenerationStatus.FINISHED
    tokens = 0
    started = time.perf_counter()
    handles = [
        pipeline.add_request(first_id + number, prompt, config) for number, prompt in (next(turn) for _ in range(min(users, len(inputs))))
    ]
    while handles:
        pipeline.step()
        running = []
        for handle in handles:
            # Read as the tokens come, as a server would have to.
            while handle.can_read():
                tokens += sum(len(output.generated_ids) for output in handle.read().values())
            if handle.get_status() != finished:
                running.append(handle)
                continue
            following = next(turn, None)
            if following is not None:
                running.append(pipeline.add_request(first_id + following[0], following[1], config))
        handles = running
    return tokens, time.perf_counter() - started


def main() -> None:
    given = json.loads(sys.argv[1])
    files = msgspec.convert(given["files"], ModelFiles)
    with own_stdout() as sink:
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = max(1, round(given["kv_cache_gib"]))
        scheduler.max_num_batched_tokens = given["step_tokens"]
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        properties = {} if given["threads"] is None else {"INFERENCE_NUM_THREADS": given["threads"]}
        try:
            pipeline = openvino_genai.ContinuousBatchingPipeline(files.folder, scheduler, "CPU", properties)
        except RuntimeError as error:
            sink.write(json.dumps({"error": f"GenAI can't load {files.folder}: {error}"}) + "\n")
            return
        asked = 0

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            nonlocal asked
            prompts = token_ids(files, texts(question["requests"], question["round"]))
            tokens, seconds = closed_loop(pipeline, prompts, users=question["users"], max_tokens=question["max_tokens"], first_id=asked)
            asked += len(prompts)
            return {"tokens": tokens, "seconds": seconds, "prompt_tokens": sum(map(len, prompts)) / len(prompts)}

        answer_in_turn(answer, sys.stdin, sink, {"model": files.name})


if __name__ == "__main__":
    main()
