"""Attention over paged keys and values in torch, as a function that models of transformers call in place of their own.

The tokens of a step lie packed in one row, [1, T]; all products but attention's see nothing else. A layer's keys and values lie in two
pools, [blocks, tokens a block, heads, channels]. In a step each layer first puts its new ones into their slots. Then sequences
with equally many new tokens are taken together: their blocks are gathered side by side, a mask hides what lies beyond each one's
end, and torch's own attention does the rest. Query heads that share a key head lie beside each other as if they were
further tokens, so that no key is copied for them (grouped-query attention: Ainslie et al. 2023, arXiv 2305.13245).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from headrace.ports import ForwardBatch

if TYPE_CHECKING:
    import torch

NAME = "headrace_paged"
"""Under which transformers knows the function. Implementations that it knows no mask for are given none."""

BLOCK = 32
"""Tokens of a block: contiguous pieces of some kilobytes, which gathering copies at the memory's speed."""

_TOGETHER = 16
"""New tokens up to which sequences are computed together; longer chunks fill the device alone."""


class LayerShape(NamedTuple):
    """What a layer keeps for each token."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int

    @property
    def elements(self) -> int:
        return self.key_heads * self.key_size + self.value_heads * self.value_size


class Pools:
    """The keys and values of all layers, zeroed: no block holds what someone else left."""

    def __init__(self, shapes: dict[int, LayerShape], num_blocks: int, dtype: torch.dtype, devices: dict[int, torch.device]) -> None:
        import torch

        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def pool(heads: int, size: int, device: torch.device) -> torch.Tensor:
            shape = num_blocks, BLOCK, heads, size
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            # Zeroes from the system: pages that are never written take no memory. torch.zeros would write them all.
            memory = np.zeros(num_blocks * BLOCK * heads * size * dtype.itemsize, np.uint8)
            return torch.from_numpy(memory).view(dtype).view(shape)

        for layer, shape in shapes.items():
            device = devices[layer]
            self.layers[layer] = pool(shape.key_heads, shape.key_size, device), pool(shape.value_heads, shape.value_size, device)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        sources, destinations = (list(side) for side in zip(*pairs, strict=True))
        for pools in self.layers.values():
            for pool in pools:
                pool[destinations] = pool[sources]


@dataclass(slots=True)
class Group:
    """Sequences with `new` tokens each, computed together."""

    new: int
    rows: Any
    """[S × new] places of their tokens among the step's; a slice where they lie side by side."""
    tables: torch.Tensor
    """[S × blocks] their blocks, filled up with block 0."""
    count: int
    past: torch.Tensor
    """[S]"""
    length: int
    """Tokens that the gathered blocks hold."""
    masks: dict[tuple[int | None, int, torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, heads: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[S, 1, heads × new, length] 0 where a token may look, -∞ elsewhere; the layers share it."""
        import torch

        kind = (window, heads, dtype, device)
        found = self.masks.get(kind)
        if found is None:
            keys = torch.arange(self.length, device=device)
            last = self.past.to(device)[:, None, None] + torch.arange(self.new, device=device)[None, :, None]
            hidden = keys > last
            if window is not None:
                hidden |= keys <= last - window
            found = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
            found = found[:, None].repeat(1, 1, heads, 1)
            self.masks[kind] = found
        return found


class Step:
    """Where the tokens of one step lie, for every layer alike."""

    def __init__(self, batch: ForwardBatch, device: torch.device) -> None:
        import torch

        begins, past = batch.subsequence_begins, batch.past_lens
        new = np.diff(begins)
        blocks = np.diff(batch.block_indices_begins)
        places = batch.position_ids
        owner = np.repeat(np.arange(len(past)), new)
        at = batch.block_indices[batch.block_indices_begins[owner] + places // BLOCK]
        self.slots = torch.from_numpy(at.astype(np.int64) * BLOCK + places % BLOCK).to(device)
        self.groups: list[Group] = []
        together = new <= _TOGETHER
        for size in np.unique(new[together]):
            self._add(batch, np.flatnonzero(new == size), int(size), blocks, device)
        for number in np.flatnonzero(~together):
            self._add(batch, np.array([number]), int(new[number]), blocks, device)
        self.single = len(self.groups) == 1

    def _add(self, batch: ForwardBatch, members: Any, new: int, blocks: Any, device: torch.device) -> None:
        import torch

        past = batch.past_lens[members]
        needed = -(-(past + new) // BLOCK)
        most = int(needed.max())
        tables = np.zeros((len(members), most), np.int64)
        for row, (member, count) in enumerate(zip(members, needed, strict=True)):
            first = batch.block_indices_begins[member]
            tables[row, :count] = batch.block_indices[first : first + count]
        starts = batch.subsequence_begins[members]
        rows: Any = slice(int(starts[0]), int(starts[0]) + len(members) * new)
        if len(members) > 1 and (np.diff(starts) != new).any():
            rows = torch.from_numpy((starts[:, None] + np.arange(new)).ravel().astype(np.int64)).to(device)
        self.groups.append(
            Group(
                new,
                rows,
                torch.from_numpy(tables.ravel()).to(device),
                len(members),
                torch.from_numpy(past.astype(np.int64)).to(device),
                most * BLOCK,
            )
        )


class Paging:
    """What the attention function finds while a step runs. One a process: a worker has one model and one thread that runs it."""

    def __init__(self) -> None:
        self.step: Step | None = None
        self.pools: Pools | None = None
        self.measured: dict[int, tuple[LayerShape, torch.device]] | None = None
        """Set while the model runs once, so that its layers tell what they keep."""

    def register(self) -> None:
        """Make the function known to transformers. Doing it again replaces the former."""
        from transformers import AttentionInterface

        AttentionInterface.register(NAME, self.attention)

    def attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[1, heads, T, channels] each; gives [1, T, heads, channels]."""
        layer: int = module.layer_idx
        if self.measured is not None:
            self.measured[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[1], value.shape[3]), key.device
            return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None
        step, pools = self.step, self.pools
        assert step is not None
        assert pools is not None
        key_pool, value_pool = pools.layers[layer]
        slots = step.slots.to(key.device)
        key_pool.view(-1, *key_pool.shape[2:]).index_copy_(0, slots, key[0].transpose(0, 1).to(key_pool.dtype))
        value_pool.view(-1, *value_pool.shape[2:]).index_copy_(0, slots, value[0].transpose(0, 1).to(value_pool.dtype))
        tokens = query[0].transpose(0, 1)
        settings = scaling, sliding_window, softcap, s_aux
        if step.single:
            return _attend(step.groups[0], tokens, key_pool, value_pool, *settings)[None], None
        out = tokens.new_empty(tokens.shape[0], tokens.shape[1], value.shape[3])
        for group in step.groups:
            out[group.rows] = _attend(group, tokens[group.rows], key_pool, value_pool, *settings)
        return out[None], None


def _attend(
    group: Group,
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """[S × new, heads, channels] of the queries' tokens."""
    import torch

    count, new, heads = group.count, group.new, query.shape[1]
    tables = group.tables.to(key_pool.device)
    key_heads = key_pool.shape[2]
    shared = heads // key_heads
    keys = key_pool.index_select(0, tables).view(count, group.length, key_heads, -1).transpose(1, 2)
    values = value_pool.index_select(0, tables).view(count, group.length, key_heads, -1).transpose(1, 2)
    # [S, key heads, queries a key head × new, channels]
    queries = query.view(count, new, key_heads, shared, -1).permute(0, 2, 3, 1, 4).reshape(count, key_heads, shared * new, -1)
    queries = queries.to(keys.dtype)
    mask = group.mask(window, shared, keys.dtype, keys.device)
    if softcap is None and sinks is None:
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scaling)
    else:
        out = _spelled_out(queries, keys, values, mask, scaling, softcap, sinks, shared)
    out = out.view(count, key_heads, shared, new, -1).permute(0, 3, 1, 2, 4)
    return out.reshape(count * new, heads, -1).to(query.dtype)


def _spelled_out(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    shared: int,
) -> torch.Tensor:
    """Attention with capped scores (Gemma 2) or with sinks, a score a head that takes weight and gives nothing (gpt-oss)."""
    import torch

    scale = queries.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (queries @ keys.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        new = queries.shape[2] // shared
        each = sinks.float().view(1, -1, shared, 1).expand(queries.shape[0], -1, -1, new).reshape(*queries.shape[:3], 1)
        weights = torch.cat([scores, each], -1).softmax(-1)[..., :-1]
    return weights.to(values.dtype) @ values
