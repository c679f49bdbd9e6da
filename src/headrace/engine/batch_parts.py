"""What every runner does to a batch before it computes it: look at its indices, and cut it where it has to go in parts."""

from __future__ import annotations

import numpy as np

from headrace.errors import RequestFailed
from headrace.ports import ForwardBatch


def check_indices(batch: ForwardBatch, *, vocab_size: int, num_blocks: int) -> None:
    """Raises `RequestFailed`. Nothing below a runner looks: OpenVINO follows a wrong index out of its memory without a word, and it ends a
    GPU's whole process.
    """
    for indices, end in (
        (batch.input_ids, vocab_size),
        (batch.rows, len(batch.input_ids)),
        (batch.block_indices, num_blocks),
    ):
        if indices.size and (indices.min() < 0 or indices.max() >= end):
            raise RequestFailed(f"A step has an index beyond its end: {indices.min()} to {indices.max()}, of {end}.")


def part(batch: ForwardBatch, first: int, last: int) -> ForwardBatch:
    """The sequences from `first` to before `last`, as a batch of their own."""
    begin, end = batch.subsequence_begins[first], batch.subsequence_begins[last]
    blocks = slice(batch.block_indices_begins[first], batch.block_indices_begins[last])
    past_lens = batch.past_lens[first:last]
    return ForwardBatch(
        input_ids=batch.input_ids[begin:end],
        position_ids=batch.position_ids[begin:end],
        past_lens=past_lens,
        subsequence_begins=batch.subsequence_begins[first : last + 1] - begin,
        block_indices=batch.block_indices[blocks],
        block_indices_begins=batch.block_indices_begins[first : last + 1] - blocks.start,
        max_context_len=int((past_lens + np.diff(batch.subsequence_begins[first : last + 1])).max()),
        rows=batch.rows[(batch.rows >= begin) & (batch.rows < end)] - begin,
        best_only=batch.best_only,
    )
