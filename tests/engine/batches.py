"""Builds what a runner is given, from lists."""

from __future__ import annotations

import numpy as np

from headrace.ports import ForwardBatch

Part = tuple[list[int], int, list[int]]
"""Tokens, how many are in the blocks already, and the blocks."""


def batch(parts: list[Part], rows: list[int] | None = None) -> ForwardBatch:
    """`rows` are by default the last of each part."""
    lengths = [len(tokens) for tokens, _, _ in parts]
    begins = np.cumsum([0, *lengths])
    return ForwardBatch(
        input_ids=np.concatenate([np.array(tokens, np.int64) for tokens, _, _ in parts]),
        position_ids=np.concatenate([np.arange(past, past + len(tokens), dtype=np.int64) for tokens, past, _ in parts]),
        past_lens=np.array([past for _, past, _ in parts], np.int32),
        subsequence_begins=begins.astype(np.int32),
        block_indices=np.concatenate([np.array(blocks, np.int32) for _, _, blocks in parts]),
        block_indices_begins=np.cumsum([0, *(len(blocks) for _, _, blocks in parts)]).astype(np.int32),
        max_context_len=max(past + len(tokens) for tokens, past, _ in parts),
        rows=(begins[1:] - 1).astype(np.int64) if rows is None else np.array(rows, np.int64),
    )
