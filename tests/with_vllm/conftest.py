"""The vllm engine's tests run where vLLM is installed: `make test-vllm` makes an environment with vLLM for CPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.unpacked import unpack
from bench.weights import find_gguf

from headrace.types import ModelFiles

ABSENT = importlib.util.find_spec("vllm") is None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)
            # vLLM's own, and those of what it imports.
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if ABSENT:
                item.add_marker(pytest.mark.skip(reason="vLLM isn't installed here: `make test-vllm` runs the vllm engine's tests"))


@pytest.fixture(scope="session", autouse=True)
def _starts_fast() -> Iterator[None]:
    """vLLM compiles nothing at its start; what it computes is the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "1")
        yield


@pytest.fixture(scope="session")
def unpacked_model(default_model: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's weights as bf16 safetensors in a Transformers folder."""
    return unpack(find_gguf(default_model, None), Path(default_model.folder), tmp_path_factory.mktemp("unpacked") / "smollm2")
