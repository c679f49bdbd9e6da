"""Which engine serves what: one rule, by the weights' format, the hardware, and what is installed. README.md has it as a table.

The rules that need a machine are functions of `Machine`, so that tests, the table and `headrace doctor` ask the same ones.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from headrace.config import ModelSection
from headrace.errors import ModelError

Format = Literal["openvino", "gguf", "safetensors", "quantized"]
EngineName = Literal["openvino", "transformers", "vllm"]

FORMATS: dict[Format, str] = {
    "openvino": "OpenVINO folder",
    "gguf": "GGUF file",
    "safetensors": "Transformers folder (safetensors)",
    "quantized": "quantized Transformers folder (GPTQ, AWQ, FP8, …)",
}

GGUF_ARCHITECTURES = frozenset({"llama", "qwen2", "qwen3"})
"""Those that OpenVINO GenAI's GGUF reader builds."""

_GGUF_FOR_TRANSFORMERS = frozenset(
    {"falcon", "gemma2", "gemma3", "gpt-oss", "gpt2", "nemotron", "phi3", "qwen2moe", "qwen3moe", "stablelm", "starcoder2"}
)
"""Further ones that transformers' reader builds, and that can be paged."""

_UNPAGED = frozenset({"linear_attention", "mamba", "mamba2", "conv", "recurrent", "rwkv", "deltanet"})
_UNPAGED_TYPES = ("mamba", "rwkv", "jamba", "bamba", "falcon_h1", "falcon_mamba", "recurrent_gemma", "zamba", "lfm2", "granitemoehybrid")

_INSTALL = "pip install 'headrace[transformers]'"
_INSTALL_VLLM = "pip install 'headrace[vllm]'"


class Model(NamedTuple):
    """What the choice looks at."""

    format: Format
    architecture: str = ""
    """Of a GGUF file; llama, qwen3, …"""
    pageable: bool = True
    """Whether OpenVINO's paged attention knows all kinds of its layers."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on."""

    gpus: int = 0
    """NVIDIA's."""
    installed: frozenset[str] = field(default_factory=frozenset)
    """Of `transformers` (with torch and accelerate), `vllm` and `convert`."""

    @classmethod
    def found(cls) -> Machine:
        """This machine, without importing anything heavy."""
        needed = {"transformers": ("torch", "transformers", "accelerate"), "vllm": ("vllm",), "convert": ("virtualenv",)}
        have = {name for name, modules in needed.items() if all(importlib.util.find_spec(module) for module in modules)}
        return cls(gpus=_gpus(), installed=frozenset(have))


class Choice(NamedTuple):
    engine: EngineName
    reason: str


def choose_engine(model: Model, machine: Machine, section: ModelSection | None = None) -> Choice:
    """The engine for a model on a machine; `section.engine` overrides. Raises `ModelError` where none can serve it, or not as asked."""
    section = section or ModelSection()
    asked = transformers_settings(section)
    if section.engine == "openvino" or (model.format == "openvino" and section.engine == "auto"):
        if asked:
            raise ModelError(f"{asked} belongs to the transformers engine, which doesn't serve this: {_why_openvino(model, section)}.")
        _check_openvino(model)
        return Choice("openvino", "engine = openvino" if section.engine == "openvino" else "OpenVINO's own format")
    choice = _by_rule(model, machine, section, asked)
    if choice.engine == "vllm":
        _check_vllm(model, machine, section)
    if choice.engine == "transformers":
        if model.format == "openvino":
            raise ModelError("engine = transformers can't read OpenVINO folders. Take the model's original repository (safetensors).")
        if section.weights != "auto":
            raise ModelError("weights is for converting to OpenVINO. The transformers engine takes quantize = int8, int4 or nf4.")
        if "transformers" not in machine.installed:
            raise ModelError(f"This takes the transformers engine ({choice.reason}), which isn't installed: {_INSTALL}.")
    elif choice.engine == "openvino":
        _check_openvino(model)
    return choice


def _by_rule(model: Model, machine: Machine, section: ModelSection, asked: str) -> Choice:
    if section.engine != "auto":
        return Choice(section.engine, f"engine = {section.engine}")
    fits_vllm = (
        "vllm" in machine.installed
        and model.format in ("safetensors", "quantized")
        and section.quantize is None
        and section.weights == "auto"
        and section.device in ("auto", "cuda")
    )
    if fits_vllm and machine.gpus > 1:
        return Choice("vllm", "there are several CUDA GPUs")
    if fits_vllm and machine.gpus and "transformers" not in machine.installed:
        return Choice("vllm", "there is a CUDA GPU, and headrace[transformers] isn't installed")
    if asked:
        return Choice("transformers", f"{asked} is set")
    if section.weights != "auto":
        return Choice("openvino", f"weights = {section.weights} is set")
    if model.format == "quantized":
        return Choice("transformers", "the checkpoint is quantized already, and OpenVINO's conversion would undo it")
    if not model.pageable:
        return Choice("transformers", "it has layers that OpenVINO's paged attention doesn't know")
    if model.format == "gguf":
        if model.architecture in _GGUF_FOR_TRANSFORMERS:
            return Choice("transformers", f"OpenVINO's GGUF reader doesn't know the architecture {model.architecture}")
        return Choice("openvino", "a GGUF file is converted once, and then runs fastest on the CPU")
    if machine.gpus and "transformers" in machine.installed:
        return Choice("transformers", "there is a CUDA GPU")
    if "convert" not in machine.installed and "transformers" in machine.installed:
        return Choice("transformers", "headrace[convert] isn't installed, so it is served without conversion")
    return Choice("openvino", "converted once, it runs fastest on the CPU")


def _check_vllm(model: Model, machine: Machine, section: ModelSection) -> None:
    if model.format in ("openvino", "gguf"):
        raise ModelError(
            f"engine = vllm can't read {'OpenVINO folders' if model.format == 'openvino' else 'GGUF files'}. "
            "Take the model's original repository (safetensors)."
        )
    if section.quantize is not None:
        raise ModelError(
            f"quantize = {section.quantize} belongs to the transformers engine. vllm takes checkpoints that are quantized: GPTQ, AWQ, FP8."
        )
    if section.weights != "auto":
        raise ModelError("weights is for converting to OpenVINO. The vllm engine takes checkpoints as they are.")
    if "vllm" not in machine.installed:
        raise ModelError(f"engine = vllm, which isn't installed: {_INSTALL_VLLM}.")


def _check_openvino(model: Model) -> None:
    if model.format == "quantized":
        raise ModelError(
            "engine = openvino can't convert a checkpoint that is quantized already. Take its original, or engine = transformers."
        )
    if not model.pageable:
        raise ModelError("engine = openvino: the model has layers that its paged attention doesn't know. Take engine = transformers.")


def _why_openvino(model: Model, section: ModelSection) -> str:
    return "engine = openvino is set" if section.engine == "openvino" else "it is an OpenVINO folder"


def transformers_settings(section: ModelSection) -> str:
    """What is set that only the transformers engine knows, such as `quantize = int8`; empty where nothing is."""
    given = {"quantize": section.quantize, "dtype": section.dtype, "device": section.device}
    return ", ".join(f"{name} = {value}" for name, value in given.items() if value not in (None, "auto"))


def described(config: Mapping[str, Any]) -> Model:
    """A Transformers folder by its config.json."""
    text = config.get("text_config")
    inner = {**config, **text} if isinstance(text, dict) else config
    kinds = inner.get("layer_types")
    layers = {str(kind) for kind in kinds} if isinstance(kinds, list) else set()
    recurrent = bool(layers & _UNPAGED) or str(inner.get("model_type", "")).startswith(_UNPAGED_TYPES)
    return Model("quantized" if config.get("quantization_config") else "safetensors", pageable=not recurrent)


def table() -> str:
    """The rules as README.md shows them: the engine for each format and each kind of machine."""
    machines = {
        "CPU, with `[convert]`": Machine(installed=frozenset({"convert"})),
        "CPU, with `[transformers]`, without `[convert]`": Machine(installed=frozenset({"transformers"})),
        "one GPU or several, with `[transformers]`": Machine(gpus=1, installed=frozenset({"transformers", "convert"})),
        "several GPUs, with `[vllm]`": Machine(gpus=2, installed=frozenset({"transformers", "vllm"})),
    }
    rows: dict[str, Model] = {FORMATS["openvino"]: Model("openvino")}
    rows[f"{FORMATS['gguf']}: {', '.join(sorted(GGUF_ARCHITECTURES))}"] = Model("gguf", "llama")
    rows[f"{FORMATS['gguf']}: {', '.join(sorted(_GGUF_FOR_TRANSFORMERS))}"] = Model("gguf", "phi3")
    rows[FORMATS["safetensors"]] = Model("safetensors")
    rows["the same, with recurrent layers"] = Model("safetensors", pageable=False)
    rows[FORMATS["quantized"]] = Model("quantized")
    lines = [f"| | {' | '.join(machines)} |", "|" + "---|" * (len(machines) + 1)]
    for name, model in rows.items():
        lines.append(f"| {name} | {' | '.join(_cell(model, machine) for machine in machines.values())} |")
    return "\n".join(lines) + "\n"


def _cell(model: Model, machine: Machine) -> str:
    try:
        return f"`{choose_engine(model, machine).engine}`"
    except ModelError:
        return "—"


def _gpus(drivers: Path = Path("/proc/driver/nvidia/gpus")) -> int:
    """As many as the driver shows, unless CUDA_VISIBLE_DEVICES hides them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return 0
    try:
        return sum(1 for _ in drivers.iterdir())
    except OSError:
        return 0
