"""What NVIDIA GPUs' memory holds, as the driver measures it (NVML), other processes' part included."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from headrace.errors import ModelError

if TYPE_CHECKING:
    import torch


class GpuMemory(NamedTuple):
    """Bytes."""

    total: int
    used: int
    free: int


def measure_gpus(devices: Sequence[int]) -> list[GpuMemory]:
    """Of each of torch's CUDA devices. Raises `ModelError` where the driver doesn't answer."""
    import torch

    return [measure(str(torch.cuda.get_device_properties(number).uuid)) for number in devices]


def measure(uuid: str) -> GpuMemory:
    """Of the GPU with this id: torch numbers only what CUDA_VISIBLE_DEVICES shows, NVML numbers all. Raises `ModelError`."""
    nvml = _library()
    try:
        nvml.nvmlInit()
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        found = nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(name))
    except nvml.NVMLError as error:
        raise ModelError(f"The GPU's memory can't be measured: NVML says {error}. Check nvidia-smi.") from error
    return GpuMemory(int(found.total), int(found.used), int(found.free))


class Gpus:
    """The GPUs among some devices, measured at most once a second."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._numbers = sorted({device.index or 0 for device in devices if device.type == "cuda"})
        self._measured_at = float("-inf")
        self._found = (0, 0)

    def memory(self) -> tuple[int, int]:
        """Bytes in use and in all; the last measurement where the driver doesn't answer."""
        now = time.monotonic()
        if self._numbers and now - self._measured_at >= 1:
            self._measured_at = now
            try:
                found = measure_gpus(self._numbers)
            except ModelError:
                return self._found
            self._found = sum(gpu.used for gpu in found), sum(gpu.total for gpu in found)
        return self._found


def all_gpus() -> list[tuple[str, GpuMemory]]:
    """Name and memory of every GPU that the driver knows; none where there is no driver. Needs no torch."""
    try:
        nvml = _library()
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(nvml.nvmlDeviceGetCount())]
        found = []
        for handle in handles:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            found.append((str(nvml.nvmlDeviceGetName(handle)), GpuMemory(int(memory.total), int(memory.used), int(memory.free))))
    except ModelError:
        return []
    except nvml.NVMLError:
        return []
    return found


def _library() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise ModelError("Measuring a GPU's memory needs nvidia-ml-py: pip install 'headrace[transformers]'.") from error
    return pynvml
