"""The `Runner` over OpenVINO: a model on this machine's CPU, its keys and values in paged blocks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from headrace.engine.batch_parts import check_indices, part
from headrace.engine.candidates import lower_first
from headrace.engine.kv_budget import block_count, resident_memory
from headrace.engine.mapped_file import let_go
from headrace.engine.paged_graph import CACHES, CANDIDATES_INPUT, ROWS_INPUT, STEP_INPUTS, page
from headrace.engine.populate import Populate
from headrace.errors import ModelError, RequestFailed
from headrace.ports import ForwardBatch

if TYPE_CHECKING:
    import openvino

Precision = Literal["auto", "f32"]

_TOP_LOGITS, _TOP_IDS, _LOGSUMEXP, _LOGITS = range(4)
_ALIGNMENT = 64


class OpenVinoRunner:
    """Runs the model in `folder` (`openvino_model.xml` and `.bin`) over `num_blocks` KV blocks.

    Without `num_blocks`, `kv_budget` finds the number from `kv_bytes` or from free memory, for `max_sequences` of
    `context_length` tokens; `memory_share` of it is for this model, where several share the machine, and as much as this
    process has taken is left free where it is `beside_another` like it, still to be loaded. `threads` None is
    one a core. `precision` "f32" computes and keeps keys and values in float32, for comparisons; "auto" takes what is fastest
    on the machine: bfloat16 where it has it, activations quantized to 8 bits on the fly where weights are, and keys and values in
    bfloat16, or in 8 bits where the machine doesn't compute in that.

    `deterministic` runs each sequence by itself, so that a distribution depends on nothing else in the batch: matrix
    products round differently with the number of rows. It gives up what batching gains.

    Built cheaply; `load` does the work. Used from one thread.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        num_blocks: int | None,
        kv_bytes: int | None,
        context_length: int,
        max_sequences: int,
        threads: int | None,
        memory_share: float = 1.0,
        beside_another: bool = False,
        deterministic: bool = False,
        precision: Precision = "auto",
    ) -> None:
        self._folder = Path(folder)
        self._num_blocks = num_blocks or 0
        self._kv_bytes = kv_bytes
        self._context_length = context_length
        self._max_sequences = max_sequences
        self._threads = threads
        self._memory_share = memory_share
        self._beside_another = beside_another
        self._deterministic = deterministic
        self._precision = precision
        self._block_size = 0
        self._vocab_size = 0
        self._block_bytes = 0
        self._numerics = ""
        self._rewinds = False
        self._request: Any = None
        self._places: dict[str, int] = {}
        """Of the inputs that change from step to step, among all inputs."""
        self._fed: dict[str, NDArray[Any]] = {}
        """What the request reads each of them from."""
        self._caches: list[NDArray[np.uint8]] = []
        self._populate: Populate | None = None
        self._steps = 0
        self.meanwhile: Callable[[], None] | None = None

    def load(self) -> None:
        """Read, page and compile the model, and allocate its blocks. Takes seconds.

        Raises `ModelError` for files that OpenVINO can't read, a model that can't be paged, and too little memory.
        """
        import openvino as ov

        core = ov.Core()
        path = self._folder / "openvino_model.xml"
        if not path.is_file():
            raise ModelError(f"{self._folder} has no openvino_model.xml; pull or convert the model again.")
        try:
            model = core.read_model(path)
        except RuntimeError as error:
            raise ModelError(f"OpenVINO can't read {path}: {str(error)[-300:]}. Pull or convert the model again.") from error
        page(model)
        try:
            compiled = core.compile_model(model, "CPU", self._options(core))
        except RuntimeError as error:
            raise ModelError(f"OpenVINO can't run this model on the CPU: {str(error)[-300:]}") from error
        self._vocab_size = compiled.output("logits").get_partial_shape()[1].get_length()
        self._request = compiled.create_infer_request()
        changing = {*STEP_INPUTS, ROWS_INPUT, CANDIDATES_INPUT}
        self._places = {name: place for place, port in enumerate(compiled.inputs) for name in port.get_names() & changing}
        self._allocate(ov, compiled)
        said = {name: str(compiled.get_property(name)) for name in ("INFERENCE_PRECISION_HINT", "DYNAMIC_QUANTIZATION_GROUP_SIZE")}
        self._numerics = f"openvino {ov.__version__} {said} deterministic={self._deterministic}"

    def _options(self, core: openvino.Core) -> dict[str, Any]:
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        if self._threads is not None:
            options["INFERENCE_NUM_THREADS"] = self._threads
        if self._precision == "f32":
            options |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
        elif core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name() == "bf16":
            # What attention computes in. OpenVINO's default of u8 takes 0.6 of the memory, but each step then spends 4 to 7 %
            # (1 to 16 sequences, 2 cores, AVX-512) on unpacking it, and long contexts drift.
            options["KV_CACHE_PRECISION"] = "bf16"
        return options

    def _allocate(self, ov: Any, compiled: openvino.CompiledModel) -> None:
        """Every layer's keys and values. The shape and type of a block are known only now: the CPU plugin chooses them."""
        caches = [port for port in compiled.inputs if port.get_any_name().startswith(CACHES)]
        shapes = [[dim.get_length() for dim in list(port.get_partial_shape())[1:]] for port in caches]
        bits = [port.get_element_type().bitwidth for port in caches]
        # Quantized keys share their scales within a block: every token written there changes what the others are read as.
        self._rewinds = min(bits) >= 16
        sizes = [int(np.prod(shape)) * width // 8 for shape, width in zip(shapes, bits, strict=True)]
        self._block_bytes = sum(sizes)
        # Values lie as [heads, tokens, channels]; a quantized key block has further rows for its scales.
        self._block_size = min(shape[1] for port, shape in zip(caches, shapes, strict=True) if port.get_any_name().startswith("value"))
        if not self._num_blocks:
            self._num_blocks = block_count(
                block_bytes=self._block_bytes,
                block_size=self._block_size,
                context_length=self._context_length,
                max_sequences=self._max_sequences,
                kv_bytes=self._kv_bytes,
                memory_share=self._memory_share,
                kept_bytes=resident_memory() if self._beside_another else 0,
            )
        for port, shape, size in zip(caches, shapes, sizes, strict=True):
            # Zeroes from the system: no block holds what another process or a former sequence left, and pages far from those
            # in use take no memory.
            memory = np.zeros(self._num_blocks * size + _ALIGNMENT, np.uint8)
            start = -memory.ctypes.data % _ALIGNMENT
            memory = memory[start : start + self._num_blocks * size]
            tensor = ov.Tensor(memory, ov.Shape([self._num_blocks, *shape]), port.get_element_type())
            self._request.set_tensor(port.get_any_name(), tensor)
            self._caches.append(memory.reshape(self._num_blocks, size))
        regions = [(memory.ctypes.data, size) for memory, size in zip(self._caches, sizes, strict=True)]
        self._populate = Populate(regions, self._num_blocks)
        weakref.finalize(self, self._populate.close)

    def warmed_up(self) -> None:
        """`ports.HearsOfWarmUp`."""
        # By now the graph has copies of its own, in the order that its kernels want.
        let_go(self._folder / "openvino_model.bin")
        if self._populate is not None:
            self._populate.start()

    @property
    def block_size(self) -> int:
        return self._block_size

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def rewinds(self) -> bool:
        """False also where each sequence is computed by itself: guesses save nothing there."""
        return self._rewinds and not self._deterministic

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return self._block_bytes

    @property
    def numerics(self) -> str:
        """What besides the weights determines a distribution; part of the engine's fingerprint."""
        return self._numerics

    def forward(self, batch: ForwardBatch) -> OpenVinoResult:
        """Run one step; the interpreter is free meanwhile. Raises `RequestFailed` where OpenVINO refuses the batch."""
        if self._deterministic and len(batch.past_lens) > 1:
            return _joined([self._run(part(batch, number, number + 1)).settled() for number in range(len(batch.past_lens))])
        return self._run(batch)

    def _run(self, batch: ForwardBatch) -> OpenVinoResult:
        check_indices(batch, vocab_size=self._vocab_size, num_blocks=self._num_blocks)
        self._steps += 1
        if self._populate is not None:
            self._populate.reach(int(batch.block_indices.max(initial=-1)))
        request = self._request
        try:
            self._feed("input_ids", batch.input_ids)
            self._feed("position_ids", batch.position_ids)
            self._feed("past_lens", batch.past_lens)
            self._feed("subsequence_begins", batch.subsequence_begins)
            self._feed("block_indices", batch.block_indices)
            self._feed("block_indices_begins", batch.block_indices_begins)
            self._feed("max_context_len", np.array(batch.max_context_len, np.int32))
            self._feed(ROWS_INPUT, batch.rows)
            self._feed(CANDIDATES_INPUT, np.array(not batch.best_only))
            request.start_async()
            if self.meanwhile is not None:
                self.meanwhile()
            request.wait()
        except RuntimeError as error:
            raise RequestFailed(f"The model refused a step: {str(error)[-300:]}") from error
        if batch.best_only:
            # Six times as fast as the graph's own search.
            logits = request.get_output_tensor(_LOGITS).data
            ids = logits.argmax(axis=1, keepdims=True)
            largest = np.take_along_axis(logits, ids, axis=1)
            return OpenVinoResult(ids, largest, largest[:, 0], None, self)
        top = request.get_output_tensor(_TOP_LOGITS).data.copy()
        return OpenVinoResult(
            lower_first(request.get_output_tensor(_TOP_IDS).data, top),
            top,
            request.get_output_tensor(_LOGSUMEXP).data.copy(),
            # Looked at when a row is read: that copies the row alone, and a step whose rows nobody reads pays nothing.
            None,
            self,
        )

    def _feed(self, name: str, array: NDArray[Any]) -> None:
        """Have the request read `array`: where its shape is the last step's, from the same memory. Handing over a tensor costs a
        decode more than all else that Python does for it (0.04 ms each, its code being out of the caches after a step).
        """
        import openvino as ov

        fed = self._fed.get(name)
        if fed is not None and fed.shape == array.shape:
            fed[...] = array
            return
        fed = self._fed[name] = array.copy()
        self._request.set_input_tensor(self._places[name], ov.Tensor(fed, shared_memory=True))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer."""
        if not pairs:
            return
        sources, destinations = (list(side) for side in zip(*pairs, strict=True))
        for cache in self._caches:
            cache[destinations] = cache[sources]


class OpenVinoResult:
    """The distributions of one step's rows; `logits` reads the runner's own memory until the next step."""

    __slots__ = ("_logits", "_runner", "_step", "logsumexp", "top_ids", "top_logits")

    def __init__(
        self,
        top_ids: NDArray[np.int64],
        top_logits: NDArray[np.float32],
        logsumexp: NDArray[np.float32],
        logits: NDArray[np.float32] | None,
        runner: OpenVinoRunner | None,
    ) -> None:
        self.top_ids = top_ids
        self.top_logits = top_logits
        self.logsumexp = logsumexp
        self._logits = logits
        self._runner = runner
        self._step = runner._steps if runner is not None else 0

    def logits(self, row: int) -> NDArray[np.float32]:
        """[vocabulary] all logits of a row; a fresh copy. Raises `RuntimeError` once the runner went on."""
        if self._runner is not None and self._runner._steps != self._step:
            raise RuntimeError("A step's logits were read after the next step.")
        logits: NDArray[np.float32] = self._all_logits()[row].copy()
        return logits

    def _all_logits(self) -> NDArray[np.float32]:
        if self._logits is None:
            assert self._runner is not None
            self._logits = self._runner._request.get_output_tensor(_LOGITS).data
        return self._logits

    def settled(self) -> OpenVinoResult:
        """The same with its logits copied, to outlive the next step."""
        return OpenVinoResult(self.top_ids, self.top_logits, self.logsumexp, self._all_logits().copy(), None)


def _joined(results: list[OpenVinoResult]) -> OpenVinoResult:
    return OpenVinoResult(
        np.concatenate([result.top_ids for result in results]),
        np.concatenate([result.top_logits for result in results]),
        np.concatenate([result.logsumexp for result in results]),
        np.concatenate([result._all_logits() for result in results]),
        None,
    )
