"""Which engine `headrace doctor` expects to serve a model, why, and what the transformers engine will take of memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli import machine
from headrace.config import Config
from headrace.errors import ModelError
from headrace.models.engine_choice import FORMATS, Choice, Machine, Model, choose_engine, described

if TYPE_CHECKING:
    from headrace.engine.torch_device import Hardware
    from headrace.engine.torch_fit import Fit


def found_model(config: Config) -> tuple[Model, Path | None] | None:
    """The configured model's format, and the folder or file that holds it; None for what needs no engine or isn't known yet.

    Raises `ModelError`.
    """
    from headrace.models import catalog
    from headrace.models.address import Local, Repository, parse

    section = config.model
    address = parse(section.model, section.hub)
    match address:
        case Local(path):
            return _at(path)
        case catalog.CatalogEntry():
            return by_name(address.mirror if section.hub == "modelscope" and address.mirror else address.source), None
        case Repository():
            return by_name(str(address)), None
    return None


def by_name(source: str) -> Model:
    """What a source probably holds that isn't looked into: publishers put the format into the name."""
    name = source.lower().partition("@")[0] + source.lower().rpartition(":")[2]
    if "gguf" in name:
        return Model("gguf", "llama")
    if name.startswith("hf:openvino/") or re.search(r"-ov\b", name):
        return Model("openvino")
    return Model("quantized" if re.search(r"gptq|awq|fp8|bnb", name) else "safetensors")


def engine_of(config: Config, on: Machine | None = None) -> tuple[Model, Choice, Path | None] | None:
    """The model, the engine that serves it and why, and where it is. Raises `ModelError` where none can."""
    found = found_model(config)
    if found is None:
        return None
    model, path = found
    return model, choose_engine(model, on or Machine.found(), config.model), path


def explained(model: Model, choice: Choice, *, known: bool) -> str:
    """One line: what serves it and why. `known`: the format was looked at, not guessed by the name."""
    this = f"this {FORMATS[model.format]}" if known else f"what is, by its name, {_a(FORMATS[model.format])}"
    return f"{choice.engine} serves {this}: {choice.reason}"


def _a(thing: str) -> str:
    return f"{'an' if thing[0] in 'AEIO' else 'a'} {thing}"


def torch_fit(config: Config, path: Path) -> tuple[Fit, int, str]:
    """What the transformers engine takes for the folder or file, what there is for it, and where; torch isn't imported.

    Raises `ModelError` for what the device can't do.
    """
    from headrace.engine.kv_budget import free_memory
    from headrace.engine.torch_device import choose_dtype, choose_place
    from headrace.engine.torch_fit import reckon
    from headrace.engine.torch_quantize import check_quantize
    from headrace.models.as_stored import gguf_settings, weights_of
    from headrace.models.card import read_card, read_object
    from headrace.types import StoredTensor

    section, engine = config.model, config.engine
    gguf = path if path.is_file() else next(iter(path.glob("*.gguf")), None)
    settings = read_object(path / "config.json") if gguf is None else gguf_settings(gguf)
    tensors = weights_of(path) if path.is_dir() else [StoredTensor(path.name, "GGUF", (), path.stat().st_size)]
    hardware = hardware_here()
    place = choose_place(section.device, hardware)
    dtype = "bfloat16" if section.quantize and place.kind == "cpu" else choose_dtype(section.dtype, place, hardware)
    if section.quantize is not None:
        check_quantize(section.quantize, place, dtype, "quantized" if settings.get("quantization_config") else None)
    fit = reckon(
        tensors,
        settings,
        kind=place.kind,
        dtype=dtype,
        quantize=section.quantize,
        context=section.context or (read_card(path).context_length if path.is_dir() else 0),
        max_sequences=engine.max_sequences,
        step_tokens=engine.step_tokens,
    )
    if place.kind != "cuda":
        return fit, free_memory(), f"{place.kind}, {dtype}"
    from headrace.engine.gpu_memory import all_gpus

    gpus = [memory for _, memory in all_gpus()]
    free = sum(max(0.0, min(gpu.free, gpu.total * engine.gpu_memory_utilization - gpu.used)) for gpu in gpus)
    return fit, int(free), f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}, {dtype}"


def hardware_here() -> Hardware:
    """As the driver and the kernel tell it, torch unasked; a GPU counts as Ampere or later."""
    from headrace.engine.torch_device import Hardware

    flags = machine.features()
    return Hardware(gpus=Machine.found().gpus, capability=(8, 0), cpu_bf16=bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}))


def _at(path: Path) -> tuple[Model, Path]:
    from headrace.models import openvino_folder, transformers_folder
    from headrace.models.card import read_object
    from headrace.models.gguf_metadata import read_metadata

    if path.is_dir() and openvino_folder.is_one(path):
        return Model("openvino"), path
    if path.is_dir() and transformers_folder.is_transformers(path):
        return described(read_object(path / "config.json")), path
    file = path if path.is_file() else next(iter(sorted(path.glob("*.gguf"))), None)
    if file is None:
        raise ModelError(f"{path} holds no model.")
    return Model("gguf", str(read_metadata(file).get("general.architecture", ""))), path
