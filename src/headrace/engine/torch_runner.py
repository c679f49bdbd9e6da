"""The `Runner` over torch: a model as transformers has it, on a GPU or the CPU, its keys and values in paged blocks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headrace.engine.batch_parts import check_indices, part
from headrace.engine.candidates import lower_first
from headrace.engine.gpu_memory import Gpus
from headrace.engine.torch_paged import BLOCK, LayerShape, Paging, Pools, Step
from headrace.errors import RequestFailed
from headrace.ports import ForwardBatch

if TYPE_CHECKING:
    import torch

CANDIDATES = 64
"""The likeliest tokens that a step brings back of each row; the others stay on the device until somebody asks."""
_RECOVERED = 256
"""Steps without trouble after which batches may be twice as large again."""

logger = logging.getLogger(__name__)


class TorchRunner:
    """Runs `model`, whose attention is `paging`'s, over `num_blocks` KV blocks.

    `deterministic` runs each sequence by itself: products round differently with the number of rows. A batch for which the device has
    too little memory is computed in parts, and for a while no batch is larger than what went well.
    Used from one thread.
    """

    def __init__(
        self,
        model: Any,
        paging: Paging,
        shapes: dict[int, LayerShape],
        devices: dict[int, torch.device],
        *,
        num_blocks: int,
        device: torch.device,
        dtype: torch.dtype,
        numerics: str,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._deterministic = deterministic
        self._paging = paging
        self._device = device
        self._num_blocks = num_blocks
        self._gpus = Gpus(devices.values())
        self._pools = Pools(shapes, num_blocks, dtype, devices)
        self._vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self._steps = 0
        self._most_tokens: int | None = None
        self._calm = 0
        self.numerics = numerics
        """What besides the weights determines a distribution; part of the engine's fingerprint."""

    @property
    def block_size(self) -> int:
        return BLOCK

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def rewinds(self) -> bool:
        """A step writes all its keys before any is looked at, and what lies beyond a sequence's end is hidden."""
        return not self._deterministic

    def gpu_memory(self) -> tuple[int, int]:
        """Bytes in use and in all on the model's GPUs, as NVML measures them; zeroes elsewhere."""
        return self._gpus.memory()

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        if pairs:
            self._pools.copy(pairs)

    def forward(self, batch: ForwardBatch) -> TorchResult:
        """Run one step. Raises `RequestFailed` where a sequence alone is too much, or the model refuses the batch."""
        check_indices(batch, vocab_size=self._vocab_size, num_blocks=self._num_blocks)
        self._steps += 1
        result = self._in_parts(batch)
        self._calm += 1
        if self._most_tokens is not None and self._calm >= _RECOVERED:
            self._most_tokens, self._calm = 2 * self._most_tokens, 0
            if self._most_tokens > 2**20:
                self._most_tokens = None
        return result

    def _in_parts(self, batch: ForwardBatch) -> TorchResult:
        most = self._most_tokens
        alone = len(batch.past_lens) == 1
        if alone or (not self._deterministic and (most is None or len(batch.input_ids) <= most)):
            try:
                return self._run(batch)
            except RuntimeError as error:
                self._paging.step = None
                if not out_of_memory(error):
                    raise RequestFailed(f"The model refused a step: {str(error)[-300:]}") from error
                failed = error
            # Outside the handler: while the error lives, so do the frames that hold the step's tensors.
            self._release(len(batch.input_ids), str(failed))
            del failed
            if alone:
                raise RequestFailed("The device's memory doesn't suffice for this request beside the others'. Try it later, or shorter.")
        half = len(batch.past_lens) // 2
        parts = [part(batch, 0, half), part(batch, half, len(batch.past_lens))]
        return _joined([self._in_parts(each) for each in parts], self)

    def _release(self, tokens: int, reason: str) -> None:
        """Give cached memory back, and take smaller batches from now on."""
        import torch

        self._most_tokens, self._calm = max(1, tokens // 2), 0
        logger.warning("out of memory in a step of %d tokens, going on with %d at most: %s", tokens, self._most_tokens, reason[:300])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        elif torch.backends.mps.is_available():
            torch.mps.empty_cache()

    def _run(self, batch: ForwardBatch) -> TorchResult:
        import torch

        paging, device = self._paging, self._device
        with torch.inference_mode():
            paging.pools, paging.step = self._pools, Step(batch, device)
            out = self._model(
                input_ids=torch.from_numpy(batch.input_ids)[None].to(device),
                position_ids=torch.from_numpy(batch.position_ids)[None].to(device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(batch.rows).to(device),
            )
            paging.step = None
            return distributions(out.logits[0], self)


def distributions(logits: torch.Tensor, runner: Any) -> TorchResult:
    """What a step brings back of its [R, vocabulary] logits."""
    logits = logits.float()
    top = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
    ids, values = top.indices.cpu().numpy().astype(np.int64), top.values.cpu().numpy()
    return TorchResult(lower_first(ids, values), values, logits.logsumexp(-1).cpu().numpy(), [logits], runner)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch had too little memory, on whatever device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


class TorchResult:
    """The distributions of one step's rows; `logits` reads the device's memory until the next step."""

    __slots__ = ("_logits", "_runner", "_step", "logsumexp", "top_ids", "top_logits")

    def __init__(
        self,
        top_ids: NDArray[np.int64],
        top_logits: NDArray[np.float32],
        logsumexp: NDArray[np.float32],
        logits: list[torch.Tensor],
        runner: Any,
    ) -> None:
        self.top_ids = top_ids
        self.top_logits = top_logits
        self.logsumexp = logsumexp
        self._logits = logits
        self._runner = runner
        self._step: int = runner._steps

    def logits(self, row: int) -> NDArray[np.float32]:
        """[vocabulary] all logits of a row; a fresh copy. Raises `RuntimeError` once the runner went on."""
        if self._runner._steps != self._step:
            raise RuntimeError("A step's logits were read after the next step.")
        for each in self._logits:
            if row < len(each):
                found: NDArray[np.float32] = each[row].cpu().numpy().copy()
                return found
            row -= len(each)
        raise IndexError(f"There is no row {row} beyond the last.")


def _joined(results: list[TorchResult], runner: TorchRunner) -> TorchResult:
    return TorchResult(
        np.concatenate([result.top_ids for result in results]),
        np.concatenate([result.top_logits for result in results]),
        np.concatenate([result.logsumexp for result in results]),
        [each for result in results for each in result._logits],
        runner,
    )
