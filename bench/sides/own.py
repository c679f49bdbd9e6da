"""Our engine in process, without HTTP: as the worker builds it, fed from a closed loop of users."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

import msgspec

from bench.sides.prompts import texts, token_ids
from bench.turns import answer_in_turn, own_stdout
from headrace.config import Config, EngineSection
from headrace.ports import Engine
from headrace.types import Delta, GenerateRequest, ModelFiles, Sampling
from headrace.worker import build_engine


async def closed_loop(engine: Engine, prompts: list[list[int]], *, users: int, max_tokens: int, name: str) -> tuple[int, float]:
    """Output tokens and seconds of all prompts, `users` at a time, greedy and to the last token."""
    turn = iter(enumerate(prompts))
    sampling = Sampling(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    tokens = 0

    async def user() -> None:
        nonlocal tokens
        for number, prompt in turn:
            async for events in engine.generate(GenerateRequest(id=f"{name}-{number}", prompt=prompt, sampling=sampling)):
                tokens += sum(len(event.tokens) for event in events if isinstance(event, Delta))

    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(users):
            group.create_task(user())
    return tokens, time.perf_counter() - started


def main() -> None:
    given = json.loads(sys.argv[1])
    files = msgspec.convert(given["files"], ModelFiles)
    config = Config(engine=EngineSection(threads=given["threads"], kv_cache_gib=given["kv_cache_gib"], max_sequences=64))
    with own_stdout() as sink, asyncio.Runner() as runner:
        engine = build_engine(files, config)
        card = runner.run(engine.start())

        def answer(question: dict[str, Any]) -> dict[str, Any]:
            prompts = token_ids(files, texts(question["requests"], question["round"]))
            run = closed_loop(engine, prompts, users=question["users"], max_tokens=question["max_tokens"], name=str(question["round"]))
            tokens, seconds = runner.run(run)
            return {"tokens": tokens, "seconds": seconds, "prompt_tokens": sum(map(len, prompts)) / len(prompts)}

        answer_in_turn(answer, sys.stdin, sink, {"model": card.model})
        runner.run(engine.close())


if __name__ == "__main__":
    main()
