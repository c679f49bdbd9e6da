"""GPU memory is measured by the driver's library, found by the GPU's own id, and shown with the engine's figures."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_runner import FakeRunner, LetterTokenizer

from headrace.config import EngineSection
from headrace.engine import gpu_memory
from headrace.engine.scheduled import ScheduledEngine
from headrace.errors import ModelError


class Driver:
    """Stands in for NVML, of which there is none without its hardware."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.broken = False

    def nvmlInit(self) -> None:
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=1000, used=400, free=600)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    return driver


def test_a_gpu_is_found_by_its_id(driver: Driver) -> None:
    assert gpu_memory.measure("12-34") == gpu_memory.GpuMemory(1000, 400, 600)
    assert gpu_memory.measure("GPU-56").free == 600
    assert driver.asked == ["GPU-12-34", "GPU-56"]


def test_a_driver_that_doesnt_answer_is_named(driver: Driver) -> None:
    driver.broken = True
    with pytest.raises(ModelError, match="Driver Not Loaded"):
        gpu_memory.measure("12")
    assert gpu_memory.all_gpus() == []


class OnGpu(FakeRunner):
    def gpu_memory(self) -> tuple[int, int]:
        return 400, 1000


@pytest.mark.anyio
@pytest.mark.parametrize(("runner", "expected"), [(OnGpu, (400, 1000)), (FakeRunner, (0, 0))])
async def test_the_engine_shows_it(runner: type[FakeRunner], expected: tuple[int, int]) -> None:
    engine = ScheduledEngine(
        runner, LetterTokenizer, name="m", kind="transformers", context_length=64, fingerprint="", config=EngineSection(max_sequences=4)
    )
    await engine.start()
    stats = engine.stats()
    await engine.close()
    assert (stats.gpu_used, stats.gpu_total) == expected
