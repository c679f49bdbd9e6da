"""Loads a model with transformers, in evaluation mode, and makes the runner that fits it."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headrace.engine.gpu_memory import GpuMemory, measure_gpus
from headrace.engine.kv_budget import block_count, free_memory, resident_memory
from headrace.engine.torch_device import Hardware, Place, choose_dtype, choose_place, torch_dtype
from headrace.engine.torch_fit import Fit, check_fit, reckon
from headrace.engine.torch_paged import BLOCK, NAME, LayerShape, Paging
from headrace.engine.torch_quantize import Quantize, check_quantize, check_stored, loading_config, pack_for_cpu
from headrace.engine.torch_runner import TorchRunner
from headrace.engine.torch_self_check import differs
from headrace.engine.torch_unpaged import UnpagedRunner
from headrace.errors import ModelError
from headrace.types import StoredTensor

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to load, and how."""

    folder: Path
    tensors: Sequence[StoredTensor]
    """As the weights' headers list them."""
    config: Mapping[str, Any]
    """config.json; for a GGUF file what its metadata says in the same words."""
    context_length: int
    max_sequences: int
    step_tokens: int
    gguf: str = ""
    """Name of the GGUF file, if that is what holds the weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    quantize: Quantize | None = None
    trust_remote_code: bool = False
    threads: int | None = None
    kv_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    memory_share: float = 1.0
    """Of the memory that is free, this model's part, where several share the machine."""
    num_blocks: int = 0
    """KV blocks, if not to be found from the memory."""
    beside_another: bool = False
    """Leave as much memory free as this process has taken: another like it is still to be loaded."""
    deterministic: bool = False
    """Compute each sequence by itself, so that a distribution depends on nothing else in the batch."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a model goes, in which type, and what it takes there."""

    place: Place
    dtype: str
    fit: Fit
    free: int
    where: str


def plan(wanted: Wanted, hardware: Hardware | None = None) -> Plan:
    """Decide, before anything is loaded. Raises `ModelError` for what this machine can't do or has no room for."""
    hardware = hardware or Hardware.found()
    place = choose_place(wanted.device, hardware)
    stored = stored_quantization(wanted.config)
    if wanted.quantize is not None and place.kind == "cpu" and wanted.dtype == "auto":
        dtype: str = "bfloat16"
    else:
        dtype = choose_dtype(wanted.dtype, place, hardware)
    if wanted.quantize is not None:
        check_quantize(wanted.quantize, place, dtype, "gguf" if wanted.gguf else stored)
    check_stored(stored, place)
    fit = reckon(
        wanted.tensors,
        wanted.config,
        kind=place.kind,
        dtype=dtype,
        quantize=wanted.quantize,
        context=wanted.context_length,
        max_sequences=wanted.max_sequences,
        step_tokens=wanted.step_tokens,
    )
    free, where = _room(wanted, place)
    check_fit(fit, free, where)
    return Plan(place, dtype, fit, free, where)


def stored_quantization(config: Mapping[str, Any]) -> str | None:
    """How a checkpoint says that it is quantized."""
    said = config.get("quantization_config")
    if not isinstance(said, dict):
        return None
    if said.get("load_in_4bit") or said.get("load_in_8bit"):
        return "bitsandbytes"
    return str(said.get("quant_method") or "unknown")


def load(wanted: Wanted) -> TorchRunner | UnpagedRunner:
    """The model on its device, ready. Takes seconds to minutes. Raises `ModelError`."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ModelError(f"The transformers engine needs its packages ({error.name}): pip install 'headrace[transformers]'.") from error
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    planned = plan(wanted)
    logger.info("loading: %s; %s has %.2f GiB for it", planned.fit, planned.where, planned.free / 2**30)
    model = _model(wanted, planned)
    device = torch.device(planned.place.device)
    dtype = torch_dtype(planned.dtype)
    versions = f"torch {torch.__version__} transformers {transformers.__version__}"
    numerics = f"{versions} {planned.place.kind} {planned.dtype} {wanted.quantize or ''} deterministic={wanted.deterministic}"
    paging = Paging()
    reason, layers = _page(model, paging, device, dtype)
    if reason:
        logger.warning("this model's attention can't be paged (%s): its requests are computed one after the other", reason)
        per_token = planned.fit.kv_per_token or 1
        count = _blocks(wanted, planned, BLOCK * per_token)
        return UnpagedRunner(model, num_blocks=count, device=device, numerics=f"{numerics} unpaged")
    shapes = {layer: shape for layer, (shape, _) in layers.items()}
    devices = {layer: where for layer, (_, where) in layers.items()}
    block_bytes = BLOCK * sum(shape.elements for shape in shapes.values()) * dtype.itemsize
    return TorchRunner(
        model,
        paging,
        shapes,
        devices,
        num_blocks=_blocks(wanted, planned, block_bytes),
        device=device,
        dtype=dtype,
        numerics=numerics,
        deterministic=wanted.deterministic,
    )


def _model(wanted: Wanted, planned: Plan) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as its_logging

    silence: Any = its_logging.disable_progress_bar
    silence()
    dtype = torch_dtype(planned.dtype)
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": planned.place.device_map,
        "trust_remote_code": wanted.trust_remote_code,
        "local_files_only": True,
    }
    if wanted.gguf:
        options["gguf_file"] = wanted.gguf
    elif not wanted.trust_remote_code:
        options["use_safetensors"] = True
    if planned.place.kind == "cuda":
        options["max_memory"] = {number: int(planned.free / len(planned.place.devices)) for number in planned.place.devices}
    quantization = loading_config(wanted.quantize, planned.place, dtype)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        model = AutoModelForCausalLM.from_pretrained(wanted.folder, **options)
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ModelError(f"transformers can't load {wanted.folder.name}: {type(error).__name__}: {str(error)[:600]}") from error
    _still(model)
    elsewhere = {str(where) for where in getattr(model, "hf_device_map", {}).values()} & {"cpu", "disk"}
    if planned.place.kind == "cuda" and elsewhere:
        raise ModelError(
            f"{wanted.folder.name} doesn't fit on the GPU: transformers would leave layers on {' and '.join(sorted(elsewhere))}."
        )
    if wanted.quantize is not None and planned.place.kind == "cpu":
        pack_for_cpu(model, wanted.quantize)
    return model


def _still(model: Any) -> None:
    """No dropout, and nothing to learn."""
    model.eval()
    model.requires_grad_(False)


def _page(model: Any, paging: Paging, device: torch.device, dtype: torch.dtype) -> tuple[str, dict[int, tuple[LayerShape, torch.device]]]:
    """Put paged attention in place of the model's own; or leave it, and say why."""
    import torch

    if not model._can_set_attn_implementation() or not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} has attention of its own making", {}
    if getattr(model, "_is_stateful", False):
        return f"{type(model).__name__} has recurrent layers", {}
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} computes all logits of a prompt", {}
    own = model.config._attn_implementation
    paging.register()
    model.set_attn_implementation(NAME)
    measured: dict[int, tuple[LayerShape, torch.device]] = {}
    paging.measured = measured
    one = torch.zeros(1, 1, dtype=torch.long, device=device)
    trouble = ""
    try:
        with torch.inference_mode():
            model(input_ids=one, position_ids=one, use_cache=False)
        layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
        trouble = "" if len(measured) == layers else f"{len(measured)} of its {layers} layers have attention that can be paged"
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
        trouble = f"{type(error).__name__}: {error}"
    paging.measured = None
    trouble = trouble or differs(model, paging, own, measured, device, dtype)
    if trouble:
        model.set_attn_implementation(own)
    return trouble, measured


def _room(wanted: Wanted, place: Place) -> tuple[int, str]:
    """Bytes that the model may take, and where."""
    if place.kind == "cuda":
        gpus = measure_gpus(place.devices)
        shown = "the GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        return int(sum(_share(wanted, gpu) for gpu in gpus)), f"{shown}, at gpu_memory_utilization = {wanted.gpu_memory_utilization:g},"
    return int(free_memory() * wanted.memory_share), "the machine's memory"


def _share(wanted: Wanted, gpu: GpuMemory) -> float:
    return max(0.0, min(gpu.free, gpu.total * wanted.gpu_memory_utilization - gpu.used)) * wanted.memory_share


def _blocks(wanted: Wanted, planned: Plan, block_bytes: int) -> int:
    """KV blocks, from what is left once the weights are there."""
    if wanted.num_blocks:
        return wanted.num_blocks
    common: dict[str, Any] = {
        "block_bytes": block_bytes,
        "block_size": BLOCK,
        "context_length": wanted.context_length,
        "max_sequences": wanted.max_sequences,
        "kv_bytes": wanted.kv_bytes,
        "memory_share": wanted.memory_share,
    }
    if planned.place.kind != "cuda":
        return block_count(**common, kept_bytes=resident_memory() if wanted.beside_another else 0)
    left, _ = _room(wanted, planned.place)
    kept = planned.fit.working + (planned.fit.weights + planned.fit.working if wanted.beside_another else 0)
    return block_count(**common | {"memory_share": 1.0}, free_bytes=left, kept_bytes=kept, share=0.5 if wanted.beside_another else 1.0)


def quiet() -> None:
    """Settings of libraries that read the environment as they are imported: no network, no chatter."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
