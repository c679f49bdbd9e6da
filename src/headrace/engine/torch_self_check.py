"""Holds a model with paged attention against itself without, before it serves: what pages wrongly is found at the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.engine.torch_paged import BLOCK, NAME, LayerShape, Paging, Pools, Step
from headrace.ports import ForwardBatch

if TYPE_CHECKING:
    import torch

_TOKENS = BLOCK + 9
"""More than a block, so that tables matter."""

TOLERANCE = {4: 0.01, 2: 0.15}
"""By the bytes of the type: the difference that rounding may make, relative to the logits' spread. Wrong positions make 1 and more."""


def differs(
    model: Any,
    paging: Paging,
    own: str,
    measured: dict[int, tuple[LayerShape, torch.device]],
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Why the model, now with paged attention, doesn't give what it gives with its `own`; empty where it does.

    Some tokens in one piece, against the same in three, in blocks out of order and beside another sequence.
    """
    import torch

    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    tokens = (np.arange(_TOKENS, dtype=np.int64) * 7919 + 11) % vocabulary
    pools = Pools({layer: shape for layer, (shape, _) in measured.items()}, 6, dtype, {layer: at for layer, (_, at) in measured.items()})
    try:
        with torch.inference_mode():
            paging.pools = pools
            found = [
                _step(model, paging, device, [(tokens[first:end], first, [4, 1]), (tokens[: end - first], 0, [2, 5])])
                for first, end in ((0, 30), (30, _TOKENS - 1), (_TOKENS - 1, _TOKENS))
            ]
            model.set_attn_implementation(own)
            ids = torch.from_numpy(tokens)[None].to(device)
            wanted = model(input_ids=ids, use_cache=False).logits[0].float().cpu()
            model.set_attn_implementation(NAME)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        paging.pools = paging.step = None
    got = torch.stack(found).float().cpu()
    expected = wanted[[29, _TOKENS - 2, _TOKENS - 1]]
    spread = float(expected.std(dim=-1).mean())
    difference = float((got - expected).pow(2).mean().sqrt()) / max(spread, 1e-9)
    if not difference <= TOLERANCE[dtype.itemsize]:
        return f"its logits differ by {difference:.2f} of their spread"
    return ""


def _step(model: Any, paging: Paging, device: torch.device, parts: list[tuple[Any, int, list[int]]]) -> torch.Tensor:
    """The logits after the first part's last token."""
    import torch

    lengths = [len(tokens) for tokens, _, _ in parts]
    begins = np.cumsum([0, *lengths]).astype(np.int32)
    tables = [table[: -(-(past + len(tokens)) // BLOCK)] for tokens, past, table in parts]
    batch = ForwardBatch(
        input_ids=np.concatenate([tokens for tokens, _, _ in parts]),
        position_ids=np.concatenate([np.arange(past, past + len(tokens), dtype=np.int64) for tokens, past, _ in parts]),
        past_lens=np.array([past for _, past, _ in parts], np.int32),
        subsequence_begins=begins,
        block_indices=np.concatenate([np.array(table, np.int32) for table in tables]),
        block_indices_begins=np.cumsum([0, *(len(table) for table in tables)]).astype(np.int32),
        max_context_len=max(past + len(tokens) for tokens, past, _ in parts),
        rows=np.array([lengths[0] - 1], np.int64),
    )
    paging.step = Step(batch, device)
    out = model(
        input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
        position_ids=torch.from_numpy(batch.position_ids)[None].to(device),
        use_cache=False,
        logits_to_keep=torch.from_numpy(batch.rows).to(device),
    )
    logits: torch.Tensor = out.logits[0, 0]
    return logits
