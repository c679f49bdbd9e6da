from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.unpacked import unpack
from reference_model import GgufModel, Matrices, Reference, matched, read_gguf, read_openvino

from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.types import ModelFiles


@pytest.fixture(scope="session")
def default_gguf(default_model: ModelFiles) -> Path:
    """The file that the default model was converted from."""
    folder = Path(default_model.folder)
    (gguf,) = (folder.parents[1] / "files" / folder.name).glob("*.gguf")
    return gguf


@pytest.fixture(scope="session")
def gguf_model(default_gguf: Path) -> GgufModel:
    """What that file holds, in float32."""
    return read_gguf(default_gguf)


@pytest.fixture(scope="session")
def served_matrices(default_model: ModelFiles, gguf_model: GgufModel) -> Matrices:
    """The matrices that the served model multiplies with, by the names of the file's weights that they render."""
    return matched(gguf_model[1], read_openvino(Path(default_model.folder) / "openvino_model.xml"))


@pytest.fixture(scope="session")
def reference(gguf_model: GgufModel) -> Reference:
    """The GGUF file's weights in the transformers implementation, in float32."""
    return Reference(*gguf_model)


@pytest.fixture(scope="session")
def unpacked_model(default_model: ModelFiles, default_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as bf16 safetensors in a Transformers folder."""
    return unpack(default_gguf, Path(default_model.folder), tmp_path_factory.mktemp("unpacked") / "smollm2")


@pytest.fixture(scope="session")
def reference_as_served(gguf_model: GgufModel, served_matrices: Matrices) -> Reference:
    """The same with the matrices that the served model holds."""
    metadata, weights = gguf_model
    return Reference(metadata, weights | served_matrices)


@pytest.fixture(scope="session")
def load_runner(default_model: ModelFiles) -> Iterator[Callable[..., OpenVinoRunner]]:
    """Loaded runners of the default model, each kind once."""
    made: dict[tuple[tuple[str, Any], ...], OpenVinoRunner] = {}

    def load(**changes: Any) -> OpenVinoRunner:
        kind = tuple(sorted(changes.items()))
        if kind not in made:
            settings: dict[str, Any] = {
                "num_blocks": 128, "kv_bytes": None, "context_length": 2048, "max_sequences": 8, "threads": None
            }  # fmt: skip
            made[kind] = OpenVinoRunner(default_model.folder, **settings | changes)
            made[kind].load()
        return made[kind]

    yield load
    made.clear()
