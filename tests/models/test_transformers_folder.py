from __future__ import annotations

import os
from pathlib import Path

import pytest

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models.cache import Cache
from headrace.models.resolve import resolve
from headrace.models.tokenizer import load_tokenizer
from headrace.models.transformers_folder import content_key, precision
from models.tiny_llama import write_tiny_llama


def test_auto_is_int8_for_small_models(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    assert precision(tmp_path, "auto") == "int8"
    assert precision(tmp_path, "int4") == "int4"


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match="damaged"):
        precision(tmp_path, "auto")


def test_other_contents_or_precision_are_another_conversion(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tiny_llama(tmp_path / name, seed=seed)
    key = content_key(tmp_path / "a", cache, "int8")
    assert content_key(tmp_path / "b", cache, "auto") == key
    assert content_key(tmp_path / "c", cache, "int8") != key
    assert content_key(tmp_path / "a", cache, "full") != key


def test_offline_makes_no_environment(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "m")
    with pytest.raises(ModelError, match=r"offline|headrace\[convert\]"):
        resolve(ModelSection(model=str(tmp_path / "m"), engine="openvino", cache_dir=tmp_path / "cache", offline=True))


@pytest.mark.skipif("HEADRACE_TEST_CONVERT" not in os.environ, reason="installs 2 GB and more; `make test-convert` runs it")
def test_a_random_llama_is_converted(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny")
    section = ModelSection(model=str(tmp_path / "tiny"), cache_dir=tmp_path / "cache")
    files = resolve(section)
    assert files.context_length == 256
    tokenizer = load_tokenizer(files)
    assert tokenizer.eos_ids == {258}
    import openvino

    model = openvino.Core().read_model(str(Path(files.folder) / "openvino_model.xml"))
    assert "input_ids" in {name for port in model.inputs for name in port.get_names()}
    assert resolve(section) == files
