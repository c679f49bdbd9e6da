"""Which engine serves what, by format, hardware and what is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headrace.config import ModelSection
from headrace.errors import ModelError
from headrace.models.engine_choice import Machine, Model, choose_engine, described, table
from headrace.models.resolve import resolve
from models.tiny_llama import write_tiny_llama

BARE = Machine()
BOTH = Machine(installed=frozenset({"transformers", "convert"}))
GPU = Machine(gpus=1, installed=frozenset({"transformers", "convert"}))
UNCONVERTED = Machine(installed=frozenset({"transformers"}))
VLLM = Machine(installed=frozenset({"transformers", "convert", "vllm"}))
GPUS = Machine(gpus=4, installed=frozenset({"transformers", "vllm"}))


@pytest.mark.parametrize(
    ("model", "machine", "engine"),
    [
        (Model("openvino"), GPU, "openvino"),
        (Model("gguf", "llama"), GPU, "openvino"),
        (Model("gguf", "phi3"), BOTH, "transformers"),
        (Model("safetensors"), BOTH, "openvino"),
        (Model("safetensors"), UNCONVERTED, "transformers"),
        (Model("safetensors"), GPU, "transformers"),
        (Model("safetensors"), BARE, "openvino"),
        (Model("safetensors", pageable=False), BOTH, "transformers"),
        (Model("quantized"), BOTH, "transformers"),
        (Model("safetensors"), GPUS, "vllm"),
        (Model("quantized"), GPUS, "vllm"),
        (Model("gguf", "phi3"), GPUS, "transformers"),
        (Model("safetensors"), VLLM, "openvino"),
        (Model("safetensors"), Machine(gpus=1, installed=frozenset({"vllm"})), "vllm"),
    ],
)
def test_auto(model: Model, machine: Machine, engine: str) -> None:
    choice = choose_engine(model, machine)
    assert choice.engine == engine
    assert choice.reason


def test_the_configuration_overrides() -> None:
    assert choose_engine(Model("safetensors"), GPU, ModelSection(engine="openvino")).engine == "openvino"
    assert choose_engine(Model("gguf", "llama"), BOTH, ModelSection(engine="transformers")).engine == "transformers"
    assert choose_engine(Model("safetensors"), BOTH, ModelSection(quantize="int8")).engine == "transformers"
    assert choose_engine(Model("safetensors"), GPU, ModelSection(weights="int4")).engine == "openvino"
    assert choose_engine(Model("safetensors"), VLLM, ModelSection(engine="vllm", dtype="float32")).engine == "vllm"
    assert choose_engine(Model("safetensors"), GPUS, ModelSection(quantize="int8")).engine == "transformers"
    assert choose_engine(Model("safetensors"), GPUS, ModelSection(engine="transformers")).engine == "transformers"


@pytest.mark.parametrize(
    ("model", "machine", "section", "words"),
    [
        (Model("quantized"), BARE, ModelSection(), r"headrace\[transformers\]"),
        (Model("openvino"), BOTH, ModelSection(engine="transformers"), "OpenVINO folders"),
        (Model("openvino"), BOTH, ModelSection(quantize="int8"), "quantize = int8"),
        (Model("safetensors"), BOTH, ModelSection(engine="openvino", dtype="float32"), "dtype = float32"),
        (Model("safetensors"), BOTH, ModelSection(engine="transformers", weights="int8"), "quantize"),
        (Model("quantized"), BOTH, ModelSection(engine="openvino"), "quantized already"),
        (Model("safetensors"), BOTH, ModelSection(engine="vllm"), r"headrace\[vllm\]"),
        (Model("gguf", "llama"), VLLM, ModelSection(engine="vllm"), "GGUF"),
        (Model("openvino"), VLLM, ModelSection(engine="vllm"), "OpenVINO folders"),
        (Model("safetensors"), VLLM, ModelSection(engine="vllm", quantize="int8"), "GPTQ, AWQ"),
        (Model("safetensors"), VLLM, ModelSection(engine="vllm", weights="int8"), "weights"),
        (Model("safetensors", pageable=False), BOTH, ModelSection(engine="openvino"), "layers"),
    ],
)
def test_what_cant_be_is_refused(model: Model, machine: Machine, section: ModelSection, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        choose_engine(model, machine, section)


def test_a_folder_describes_itself() -> None:
    assert described({"model_type": "qwen3"}) == Model("safetensors")
    assert described({"quantization_config": {"quant_method": "awq"}}).format == "quantized"
    assert not described({"model_type": "mamba2"}).pageable
    assert not described({"text_config": {"layer_types": ["linear_attention", "full_attention"]}}).pageable
    assert described({"layer_types": ["sliding_attention", "full_attention"]}).pageable


def test_a_transformers_folder_is_served_where_it_is(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "tiny")
    cache = tmp_path / "cache"
    files = resolve(ModelSection(model=str(tmp_path / "tiny"), engine="transformers", cache_dir=cache))
    assert (files.kind, files.folder, files.context_length) == ("transformers", str(tmp_path / "tiny"), 256)
    quantized = resolve(ModelSection(model=str(tmp_path / "tiny"), quantize="int8", cache_dir=cache))
    assert quantized.kind == "transformers"
    assert quantized.fingerprint != files.fingerprint
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    (tmp_path / "tiny" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Y"}}))
    with pytest.raises(ModelError, match="auto_map"):
        resolve(ModelSection(model=str(tmp_path / "tiny"), engine="transformers", cache_dir=cache))


@pytest.mark.parametrize("model", ["echo", "http://127.0.0.1:9/v1"])
def test_what_runs_no_model_takes_no_engine(model: str) -> None:
    with pytest.raises(ModelError, match="engine = transformers"):
        resolve(ModelSection(model=model, engine="transformers"))


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md", "docs/engines.md"])
def test_the_table_is_up_to_date(name: str) -> None:
    text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    rows = [line for line in table().splitlines() if line.startswith(("| ", "|-"))]
    for row in rows if name != "README.zh-CN.md" else []:
        assert row in text, "run `python docs/write_tables.py`"
