"""Where a torch model goes, in which type, quantized how, and whether it fits: decided before anything is loaded."""

from __future__ import annotations

import pytest

from headrace.engine.torch_device import Hardware, Place, choose_dtype, choose_place
from headrace.engine.torch_fit import check_fit, kv_per_token, reckon
from headrace.engine.torch_load import stored_quantization
from headrace.engine.torch_quantize import check_quantize, check_stored
from headrace.errors import ModelError
from headrace.types import StoredTensor

CPU, CUDA, MPS = Place("cpu", "cpu"), Place("cuda", "cuda:0", (0,)), Place("mps", "mps")
AMPERE, TURING = Hardware(gpus=1, capability=(8, 0)), Hardware(gpus=2, capability=(7, 5))

QWEN3_8B = {
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}


@pytest.mark.parametrize(
    ("wanted", "hardware", "device", "devices"),
    [
        ("auto", Hardware(), "cpu", ()),
        ("auto", AMPERE, "cuda:0", (0,)),
        ("auto", TURING, "cuda:0", (0, 1)),
        ("cuda:1", TURING, "cuda:1", (1,)),
        ("cpu", TURING, "cpu", ()),
        ("auto", Hardware(apple=True), "mps", ()),
    ],
)
def test_place(wanted: str, hardware: Hardware, device: str, devices: tuple[int, ...]) -> None:
    place = choose_place(wanted, hardware)
    assert (place.device, place.devices) == (device, devices)


def test_several_gpus_share_the_layers_and_one_takes_all() -> None:
    assert choose_place("auto", TURING).device_map == "auto"
    assert choose_place("cuda:1", TURING).device_map == {"": "cuda:1"}
    assert choose_place("auto", Hardware()).device_map == {"": "cpu"}


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "mps"])
def test_a_device_that_isnt_there_is_refused(wanted: str) -> None:
    with pytest.raises(ModelError, match=wanted):
        choose_place(wanted, Hardware())


@pytest.mark.parametrize(
    ("place", "hardware", "dtype"),
    [
        (CUDA, AMPERE, "bfloat16"),
        (CUDA, TURING, "float16"),
        (MPS, Hardware(apple=True), "float16"),
        (CPU, Hardware(cpu_bf16=True), "bfloat16"),
        (CPU, Hardware(), "float32"),
    ],
)
def test_dtype_by_policy(place: Place, hardware: Hardware, dtype: str) -> None:
    assert choose_dtype("auto", place, hardware) == dtype
    assert choose_dtype("float32", place, hardware) == "float32"


def test_bfloat16_before_ampere_is_refused() -> None:
    with pytest.raises(ModelError, match=r"7\.5"):
        choose_dtype("bfloat16", CUDA, TURING)


@pytest.mark.parametrize(
    ("quantize", "place", "dtype", "stored", "installed", "words"),
    [
        ("nf4", CPU, "bfloat16", None, (), "needs a CUDA GPU"),
        ("int8", CPU, "float32", None, (), "bfloat16"),
        ("int8", MPS, "float16", None, (), "Apple"),
        ("nf4", CUDA, "bfloat16", None, (), r"headrace\[quantize\]"),
        ("int8", CUDA, "bfloat16", None, (), r"headrace\[quantize\]"),
        ("int4", CUDA, "bfloat16", None, ("bitsandbytes",), "torchao"),
        ("int4", CUDA, "float16", None, ("torchao",), "Ampere"),
        ("int8", CPU, "bfloat16", "gptq", (), "quantized already"),
    ],
)
def test_quantization_that_is_impossible_is_refused(
    quantize: str, place: Place, dtype: str, stored: str | None, installed: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        check_quantize(quantize, place, dtype, stored, lambda name: name in installed)  # type: ignore[arg-type]


def test_quantization_that_is_possible() -> None:
    for quantize, place, installed in [("int8", CPU, ""), ("int4", CPU, ""), ("nf4", CUDA, "bitsandbytes"), ("int4", CUDA, "torchao")]:
        check_quantize(quantize, place, "bfloat16", None, lambda name, there=installed: name == there)  # type: ignore[arg-type]


def test_a_quantized_checkpoint_says_what_to_install() -> None:
    assert stored_quantization({"quantization_config": {"quant_method": "gptq", "bits": 4}}) == "gptq"
    assert stored_quantization({"quantization_config": {"load_in_4bit": True}}) == "bitsandbytes"
    assert stored_quantization({}) is None
    with pytest.raises(ModelError, match="gptqmodel"):
        check_stored("gptq", CUDA, lambda name: False)
    check_stored("gptq", CUDA, lambda name: True)
    with pytest.raises(ModelError, match="CUDA"):
        check_stored("fbgemm_fp8", CPU, lambda name: True)


def eight_billion(**changes: object) -> list[StoredTensor]:
    inner = StoredTensor("model.layers.0.mlp.up_proj.weight", "BF16", (7_000_000, 1000), 14 * 10**9)
    return [inner, StoredTensor("model.embed_tokens.weight", "BF16", (1_000_000, 1000), 2 * 10**9)]


def test_the_arithmetic_of_memory() -> None:
    settings = {"kind": "cuda", "context": 32768, "max_sequences": 64, "step_tokens": 512}
    assert kv_per_token(QWEN3_8B, 2) == 2 * 36 * 8 * 128 * 2
    plain = reckon(eight_billion(), QWEN3_8B, dtype="bfloat16", quantize=None, **settings)  # type: ignore[arg-type]
    assert plain.weights == 16 * 10**9
    assert plain.needed == plain.weights + 32768 * 147456 + plain.working
    wide = reckon(eight_billion(), QWEN3_8B, dtype="float32", quantize=None, **settings)  # type: ignore[arg-type]
    assert wide.weights == 32 * 10**9
    four = reckon(eight_billion(), QWEN3_8B, dtype="bfloat16", quantize="nf4", **settings)  # type: ignore[arg-type]
    assert four.weights == 2 * 10**9 + int(7 * 10**9 * 4.6 / 8)
    as_it_comes = reckon(
        [StoredTensor("q", "I32", (10**9,), 4 * 10**9)], {**QWEN3_8B, "quantization_config": {}}, dtype="float16", quantize=None, **settings
    )  # type: ignore[arg-type]
    assert as_it_comes.weights == 4 * 10**9


def test_what_cant_fit_is_refused_with_the_arithmetic() -> None:
    fit = reckon(eight_billion(), QWEN3_8B, kind="cuda", dtype="bfloat16", quantize=None, context=32768, max_sequences=64, step_tokens=512)
    check_fit(fit, 24 * 2**30, "the GPU")
    with pytest.raises(ModelError) as refused:
        check_fit(fit, 16 * 2**30, "the GPU")
    for word in ("14.90 GiB", "8.00 billion in bfloat16", "4.50 GiB", "32,768 tokens × 144.0 KiB", "16.00 GiB", "--quantize"):
        assert word in refused.value.message
