"""OpenVINO's paged attention transformation is private to it; this says what we rely on, one promise a test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import openvino as ov
import openvino.opset15 as op
import pytest

from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.engine.paged_graph import CACHES, CANDIDATES_INPUT, ROWS_INPUT, STEP_INPUTS, TOP, page
from headrace.errors import ModelError
from headrace.types import ModelFiles


@pytest.fixture(scope="module")
def paged(default_model: ModelFiles) -> ov.Model:
    model = ov.Core().read_model(Path(default_model.folder) / "openvino_model.xml")
    page(model)
    return model


@pytest.mark.slow
def test_inputs(paged: ov.Model) -> None:
    names = {port.get_any_name() for port in paged.inputs}
    caches = {name for name in names if name.startswith(CACHES)}
    assert names - caches == STEP_INPUTS | {ROWS_INPUT, CANDIDATES_INPUT}
    layers = len(caches) // 2
    assert caches == {f"{kind}{layer}" for kind in CACHES for layer in range(layers)}
    types = {name: paged.input(name).get_element_type().get_type_name() for name in names - caches}
    assert {name for name, kind in types.items() if kind == "i64"} == {"input_ids", "position_ids", ROWS_INPUT}
    assert {kind for kind in types.values() if kind != "i64"} == {"i32", "boolean"}
    ranks = {name: len(paged.input(name).get_partial_shape()) for name in names - caches}
    assert {name for name, rank in ranks.items() if rank == 0} == {"max_context_len", CANDIDATES_INPUT}
    assert set(ranks.values()) == {0, 1}


@pytest.mark.slow
def test_outputs(paged: ov.Model) -> None:
    outputs = {port.get_any_name(): (str(port.get_partial_shape()), port.get_element_type().get_type_name()) for port in paged.outputs}
    assert outputs == {
        "top_logits": (f"[?,{TOP}]", "f32"),
        "top_ids": (f"[?,{TOP}]", "i64"),
        "logsumexp": ("[?]", "f32"),
        "logits": ("[?,49152]", "f32"),
    }


@pytest.mark.slow
def test_products(paged: ov.Model) -> None:
    """Of each layer one for queries, keys and values, and one for what attention says; three of its MLP; and the vocabulary's."""
    products = [node for node in paged.get_ops() if node.get_type_name() == "MatMul"]
    assert len(products) == 5 * 30 + 1
    assert all(node.get_attributes()["transpose_b"] for node in products), "rotary angles are no matrix product"


@pytest.mark.slow
def test_blocks(load_runner: Callable[..., OpenVinoRunner]) -> None:
    """The sizes that the CPU plugin chooses; in 8 bits a token's scale and offset are part of its block."""
    usual = load_runner()
    assert usual.block_size == 32
    heads, channels, layers = 3, 64, 30
    eight, sixteen = 40 * channels + 32 * (channels + 8), 2 * 32 * channels * 2
    computes_in = ov.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    assert usual.block_bytes == layers * heads * (sixteen if computes_in == "bf16" else eight)
    assert load_runner(precision="f32").block_bytes == layers * heads * 2 * 32 * channels * 4


def test_a_model_without_token_ids_is_refused() -> None:
    picture = op.parameter([1, 3, 8, 8], ov.Type.f32, name="pixels")
    picture.output(0).set_names({"pixels"})
    with pytest.raises(ModelError, match="pixels, not token ids"):
        page(ov.Model([op.result(op.relu(picture))], [picture]))


def test_a_model_without_attention_is_refused() -> None:
    ids = op.parameter([-1, -1], ov.Type.i64, name="input_ids")
    ids.output(0).set_names({"input_ids"})
    with pytest.raises(ModelError, match=r"paged.*plain decoder"):
        page(ov.Model([op.result(op.convert(ids, "f32"))], [ids]))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    runner = OpenVinoRunner(tmp_path, num_blocks=1, kv_bytes=None, context_length=32, max_sequences=1, threads=None)
    with pytest.raises(ModelError, match=r"no openvino_model\.xml"):
        runner.load()
    (tmp_path / "openvino_model.xml").write_text("<net/>")
    with pytest.raises(ModelError, match="can't read"):
        runner.load()
