"""Where a torch model runs and in which type it computes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.errors import ModelError

if TYPE_CHECKING:
    import torch

Kind = Literal["cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What torch finds on a machine."""

    gpus: int = 0
    """CUDA devices."""
    capability: tuple[int, int] = (0, 0)
    """The weakest GPU's; (8, 0) is Ampere."""
    apple: bool = False
    cpu_bf16: bool = False
    """Whether the processor multiplies bfloat16 (AVX512_BF16, AMX), rather than unpacking it."""

    @classmethod
    def found(cls) -> Hardware:
        """This machine's."""
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        features = torch.cpu.get_capabilities()
        return cls(
            gpus=gpus,
            capability=min((torch.cuda.get_device_capability(number) for number in range(gpus)), default=(0, 0)),
            apple=torch.backends.mps.is_available(),
            cpu_bf16=any(bool(features.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16")),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model goes."""

    kind: Kind
    device: str
    """For tensors: `cpu`, `mps`, `cuda:0`."""
    devices: tuple[int, ...] = ()
    """The GPUs that may hold a part of it."""

    @property
    def device_map(self) -> str | dict[str, str]:
        """For `from_pretrained`: `auto` spreads the layers over several GPUs."""
        return "auto" if len(self.devices) > 1 else {"": self.device}


def choose_place(wanted: str, hardware: Hardware) -> Place:
    """`wanted` is `auto`, `cpu`, `cuda`, `cuda:N` or `mps`. Raises `ModelError` for what isn't there."""
    numbered = re.fullmatch(r"cuda:(\d+)", wanted)
    if numbered:
        number = int(numbered[1])
        if number >= hardware.gpus:
            raise ModelError(f"device = {wanted}: torch finds {hardware.gpus or 'no'} CUDA device{'s' * (hardware.gpus != 1)} here.")
        return Place("cuda", wanted, (number,))
    if wanted == "cuda" and not hardware.gpus:
        raise ModelError(
            "device = cuda: torch finds no CUDA device. Check nvidia-smi, and that torch was installed with CUDA (torch.version.cuda)."
        )
    if wanted == "mps" and not hardware.apple:
        raise ModelError("device = mps: torch finds no Apple GPU.")
    if wanted == "cuda" or (wanted == "auto" and hardware.gpus):
        return Place("cuda", "cuda:0", tuple(range(hardware.gpus)))
    if wanted == "mps" or (wanted == "auto" and hardware.apple):
        return Place("mps", "mps")
    return Place("cpu", "cpu")


DType = Literal["float32", "bfloat16", "float16"]
BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


def choose_dtype(wanted: Literal["auto", "float32", "bfloat16", "float16"], place: Place, hardware: Hardware) -> DType:
    """`auto` is bfloat16 on a GPU (float16 before Ampere), float16 on Apple's, and on a CPU bfloat16 where that multiplies it.

    Raises `ModelError` for a type that the device can't compute in.
    """
    old_gpu = place.kind == "cuda" and hardware.capability < (8, 0)
    if wanted == "bfloat16" and old_gpu:
        raise ModelError(f"dtype = bfloat16 needs a GPU from Ampere on (8.0); this one is {'.'.join(map(str, hardware.capability))}.")
    if wanted != "auto":
        return wanted
    if place.kind == "cpu":
        return "bfloat16" if hardware.cpu_bf16 else "float32"
    return "float16" if place.kind == "mps" or old_gpu else "bfloat16"


def torch_dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found
