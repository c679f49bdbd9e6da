"""The `Runner` for models whose attention can't be paged, and for those that have none: recurrent states, layers of their own making.

Blocks hold token ids. Beside them each sequence has a cache of transformers' own kind, found by the tokens that it has seen; one that
isn't there any more is computed anew. Sequences are computed one after the other, prompts in one piece: it serves
what could not be served otherwise, at the speed of one request at a time.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headrace.engine.torch_runner import TorchResult, distributions, out_of_memory
from headrace.errors import RequestFailed
from headrace.ports import ForwardBatch

if TYPE_CHECKING:
    import torch

BLOCK = 32


class UnpagedRunner:
    """Runs `model` with its own attention and its own caches, of at most `num_blocks` × 32 tokens in all. Used from one thread."""

    reuses_prefixes = False
    """What is in a block doesn't spare computing it."""

    def __init__(self, model: Any, *, num_blocks: int, device: torch.device, numerics: str) -> None:
        self._model = model
        self._device = device
        self._ids = np.zeros((num_blocks, BLOCK), np.int64)
        self._caches: OrderedDict[bytes, tuple[int, Any]] = OrderedDict()
        """Tokens seen: how many, and the cache. The one used last is the last."""
        self._held = 0
        self._vocab_size = int(model.get_output_embeddings().weight.shape[0])
        accepted = inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in accepted else "past_key_values"
        self._keeps = "logits_to_keep" in accepted
        self._steps = 0
        self.numerics = numerics

    @property
    def block_size(self) -> int:
        return BLOCK

    @property
    def num_blocks(self) -> int:
        return len(self._ids)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination)."""
        for source, destination in pairs:
            self._ids[destination] = self._ids[source]

    def forward(self, batch: ForwardBatch) -> TorchResult:
        """Run one step. Raises `RequestFailed` where the model refuses it, or memory runs out."""
        import torch

        self._steps += 1
        rows = []
        try:
            with torch.inference_mode():
                for number in range(len(batch.past_lens)):
                    rows += self._sequence(batch, number)
        except RuntimeError as error:
            self._caches.clear()
            self._held = 0
            if out_of_memory(error):
                raise RequestFailed("The device's memory doesn't suffice for this request. Try it later, or shorter.") from None
            raise RequestFailed(f"The model refused a step: {str(error)[-300:]}") from error
        if not rows:
            none = np.zeros((0, 1), np.float32)
            return TorchResult(none.astype(np.int64), none, none[:, 0], [], self)
        return distributions(torch.cat(rows), self)

    def _sequence(self, batch: ForwardBatch, number: int) -> list[torch.Tensor]:
        """The logits of a sequence's wanted rows."""
        first, end = batch.subsequence_begins[number : number + 2]
        past = int(batch.past_lens[number])
        table = batch.block_indices[slice(*batch.block_indices_begins[number : number + 2])]
        places = batch.position_ids[first:end]
        self._ids[table[places // BLOCK], places % BLOCK] = batch.input_ids[first:end]
        wanted = batch.rows[(batch.rows >= first) & (batch.rows < end)] - first
        if not wanted.size:
            return []  # in the middle of a prompt: what follows computes it all
        history = self._ids[table].ravel()[: past + end - first]
        found = self._caches.pop(history[:past].tobytes(), None) if past and end - first == 1 else None
        if found is not None:
            self._held -= found[0]
        return [self._compute(history, past if found else 0, found[1] if found else None, wanted + past)]

    def _compute(self, history: Any, begin: int, cache: Any, wanted: Any) -> torch.Tensor:
        import torch

        keep = torch.from_numpy((wanted - begin).astype(np.int64)).to(self._device)
        inputs: dict[str, Any] = {"input_ids": torch.from_numpy(history[begin:].copy())[None].to(self._device), "use_cache": True}
        if cache is not None:
            inputs[self._cache_name] = cache
            if self._cache_name == "past_key_values":
                inputs["position_ids"] = torch.arange(begin, len(history), device=self._device)[None]
        if self._keeps:
            inputs["logits_to_keep"] = keep
        out = self._model(**inputs)
        self._keep(history, getattr(out, self._cache_name))
        logits: torch.Tensor = out.logits[0]
        return logits if self._keeps else logits[keep]

    def _keep(self, history: Any, cache: Any) -> None:
        known = history.tobytes()
        old = self._caches.pop(known, None)
        self._held += len(history) - (old[0] if old else 0)
        self._caches[known] = len(history), cache
        while self._held > len(self._ids) * BLOCK and len(self._caches) > 1:
            _, (count, _) = self._caches.popitem(last=False)
            self._held -= count
