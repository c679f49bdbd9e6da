"""Times single steps of the runner and of the sampler, without scheduler or HTTP: `python -m bench.step_time`.

For tuning: which batch sizes, chunk sizes and sampling parameters cost what, in milliseconds (median and least).
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import numpy as np

from headrace.config import ModelSection
from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.engine.sampler import SequenceSampler, sample_rows
from headrace.models.resolve import resolve
from headrace.ports import ForwardBatch
from headrace.types import Sampling

PAST = 140


def batch(sequences: int, chunk: int, past: int, block_size: int) -> ForwardBatch:
    """`chunk` new tokens for each sequence after `past` ones, whatever those are; the last of each chunk is wanted."""
    blocks = -(-(past + chunk) // block_size)
    return ForwardBatch(
        input_ids=np.random.default_rng(0).integers(100, 40_000, sequences * chunk),
        position_ids=np.tile(np.arange(past, past + chunk), sequences),
        past_lens=np.full(sequences, past, np.int32),
        subsequence_begins=np.arange(0, sequences * chunk + 1, chunk, dtype=np.int32),
        block_indices=np.arange(sequences * blocks, dtype=np.int32),
        block_indices_begins=np.arange(0, sequences * blocks + 1, blocks, dtype=np.int32),
        max_context_len=past + chunk,
        rows=np.arange(chunk - 1, sequences * chunk, chunk),
    )


def timed(what: str, work: Callable[[], object], rounds: int) -> None:
    work()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    print(f"{what:44}{statistics.median(seconds) * 1e3:9.2f} ms{min(seconds) * 1e3:9.2f} ms")


def main() -> None:
    files = resolve(ModelSection(model=sys.argv[1]) if len(sys.argv) > 1 else ModelSection())
    runner = OpenVinoRunner(
        files.folder, num_blocks=None, kv_bytes=None, context_length=files.context_length, max_sequences=32, threads=None
    )
    began = time.perf_counter()
    runner.load()
    print(f"{'load':44}{(time.perf_counter() - began) * 1e3:9.0f} ms\n{runner.numerics}\n")
    for sequences in (1, 4, 16, 32):
        step = batch(sequences, 1, PAST, runner.block_size)
        timed(f"decode, {sequences} sequences", lambda step=step: runner.forward(step), 60)
    for chunk, past in ((128, 0), (512, 0), (512, 1024)):
        step = batch(1, chunk, past, runner.block_size)
        timed(f"prefill, {chunk} tokens after {past}", lambda step=step: runner.forward(step), 6)
    step = batch(32, 1, PAST, runner.block_size)
    step.input_ids[:] = step.input_ids[0]
    result = runner.forward(step)
    timed("all logits of 32 rows", lambda: [result.logits(row) for row in range(32)], 20)
    for asked in ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}, {"presence_penalty": 0.5}):
        samplers = [
            SequenceSampler(
                Sampling(max_tokens=1, **asked), [1, 2], vocab_size=runner.vocab_size, choice=0, eos_ids=frozenset(), fallback_seed=seed
            )
            for seed in range(32)
        ]
        timed(f"32 rows with {asked}", lambda samplers=samplers: sample_rows(result, samplers), 60)


if __name__ == "__main__":
    main()
