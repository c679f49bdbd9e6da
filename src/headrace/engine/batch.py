"""The arrays of a step. Steps that only decode, over the same sequences as the step before, reuse its arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.engine.scheduler import Chunk
from headrace.engine.sequence import Sequence
from headrace.ports import ForwardBatch

Guesses = list[list[int]]
"""Of each sequence that decodes, the tokens that are guessed to follow its last."""


class Decodes:
    """The arrays of the sequences that decode, kept from step to step and changed in place."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._version = -1
        self._tables_version = -1
        self._batch: ForwardBatch | None = None

    def batch(self, sequences: list[Sequence], version: int, tables_version: int) -> ForwardBatch:
        """One token for each of `sequences`; `version` tells whether they are those of the last call."""
        if version != self._version or self._batch is None:
            self._version, self._tables_version = version, tables_version
            self._batch = build(sequences, [], self._block_size)
            return self._batch
        batch = self._batch
        batch.input_ids[:] = [sequence.tokens[sequence.length - 1] for sequence in sequences]
        batch.position_ids += 1
        batch.past_lens += 1
        batch.max_context_len += 1
        if tables_version != self._tables_version:
            self._tables_version = tables_version
            tables = [sequence.blocks.array for sequence in sequences]
            batch.block_indices, batch.block_indices_begins = np.concatenate(tables), _begins(tables)
        return batch

    def forget(self) -> None:
        """Build the arrays anew at the next call: another kind of step has moved the sequences on."""
        self._version = -1


def build(decodes: list[Sequence], chunks: list[Chunk], block_size: int, guesses: Guesses | None = None) -> ForwardBatch:
    """Arrays from scratch: decodes first, then chunks; of each, the rows that its sampler or scorer needs.

    Guesses follow their sequence as sequences of one token over the same blocks. A step writes all keys and values before
    it attends to any, so that each sees those before it, and in the same kernels, with the same rounding, as a decode.
    """
    latest: list[int] = []
    past: list[int] = []
    tables: list[NDArray[np.int32]] = []
    for number, sequence in enumerate(decodes):
        length, table = sequence.length, sequence.blocks.array
        latest.append(sequence.tokens[length - 1])
        past.append(length - 1)
        tables.append(table)
        if guesses is not None:
            for guess in guesses[number]:
                latest.append(guess)
                past.append(length)
                tables.append(table)
                length += 1
    begins = list(range(len(past) + 1))
    ids: list[NDArray[np.int64]] = [np.array(latest, np.int64)]
    positions: list[NDArray[np.int64]] = [np.array(past, np.int64)]
    rows: list[NDArray[np.int64]] = [np.arange(len(past))]
    longest = max(past, default=0) + 1
    for chunk in chunks:
        end = begins[-1] + chunk.end - chunk.begin
        ids.append(chunk.sequence.tokens[chunk.begin : chunk.end])
        positions.append(np.arange(chunk.begin, chunk.end))
        past.append(chunk.begin)
        rows.append(np.arange(end - chunk.rows, end))
        begins.append(end)
        tables.append(chunk.sequence.blocks.array[: -(-chunk.end // block_size)])
        longest = max(longest, chunk.end)
    return ForwardBatch(
        input_ids=np.concatenate(ids),
        position_ids=np.concatenate(positions),
        past_lens=np.array(past, np.int32),
        subsequence_begins=np.array(begins, np.int32),
        block_indices=np.concatenate(tables),
        block_indices_begins=_begins(tables),
        max_context_len=longest,
        rows=np.concatenate(rows),
    )


def _begins(tables: list[NDArray[np.int32]]) -> NDArray[np.int32]:
    begins = np.zeros(len(tables) + 1, np.int32)
    np.cumsum([len(table) for table in tables], out=begins[1:])
    return begins
