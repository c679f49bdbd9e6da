"""Products of the same rows as one: which are, and that no number changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset15 as op
import pytest
from numpy.typing import NDArray

from headrace.engine.merged_products import merge_products

INNER, GROUP = 64, 32
random = np.random.default_rng(0)


def plain(width: int) -> Any:
    return op.constant(random.standard_normal((width, INNER)).astype(np.float32))


def half(width: int) -> Any:
    return op.convert(op.constant(random.standard_normal((width, INNER)).astype(np.float16)), "f32")


def quantized(width: int, element: ov.Type = ov.Type.u8, *, one_zero_point: bool = False) -> Any:
    """As GGUF files and weight compression leave them: codes, zero points and scales of groups."""
    shape = [width, INNER // GROUP, GROUP]
    codes = ov.Tensor(element, ov.Shape(shape))
    stored = codes.data.reshape(-1)
    stored[:] = random.integers(0, 256, len(stored)).astype(np.uint8).view(stored.dtype)
    zeros = np.array([[[7]]] if one_zero_point else random.integers(1, 15, (width, INNER // GROUP, 1)), np.uint8)
    scales = op.constant((random.random((width, INNER // GROUP, 1)) / 100).astype(np.float16))
    centred = op.subtract(op.convert(op.constant(codes), "f16"), op.convert(op.constant(zeros), "f16"))
    return op.convert(op.reshape(op.multiply(centred, scales), op.constant(np.array([width, INNER])), False), "f32")


def biased(product: Any, width: int) -> Any:
    return op.add(product, op.convert(op.constant(random.standard_normal((1, 1, width)).astype(np.float16)), "f32"))


def heads(rows: Any) -> Any:
    return op.reshape(rows, op.constant(np.array([0, 0, -1, 4])), True)


def model_of(rows: Any, *results: Any) -> ov.Model:
    return ov.Model([op.result(result) for result in results], [rows])


def input_rows() -> Any:
    return op.parameter([-1, 1, INNER], np.float32)


def products(model: ov.Model) -> int:
    return sum(node.get_type_name() == "MatMul" for node in model.get_ops())


def computed(model: ov.Model) -> list[NDArray[np.float32]]:
    given = np.random.default_rng(1).standard_normal((5, 1, INNER)).astype(np.float32)
    found = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(given)
    return [found[place] for place in range(len(model.outputs))]


@pytest.mark.parametrize(
    "weights",
    [
        plain,
        half,
        quantized,
        lambda width: quantized(width, one_zero_point=True),
        lambda width: quantized(width, ov.Type.u4),
        lambda width: quantized(width, ov.Type.i4, one_zero_point=True),
    ],
    ids=["f32", "f16", "u8", "u8, one zero point", "u4", "i4"],
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_of_three_products_one_is_left_and_the_numbers_stay(weights: Any, with_bias: bool) -> None:
    rows = input_rows()
    made = []
    for width in (32, 16, 8):
        product = op.matmul(rows, weights(width), False, True)
        made.append(heads(biased(product, width) if with_bias else product))
    model = model_of(rows, *made)
    before = computed(model)
    assert merge_products(model) == 2
    assert products(model) == 1
    for one, other in zip(before, computed(model), strict=True):
        assert one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def pair(first: Any, second: Any, rows: Any | None = None, *, after: Any = heads) -> ov.Model:
    rows = rows or input_rows()
    return model_of(rows, after(op.matmul(rows, first, False, True)), after(op.matmul(rows, second, False, True)))


def one_bias_only(*, first: bool) -> ov.Model:
    rows = input_rows()
    made = [heads(op.matmul(rows, plain(8), False, True)), heads(biased(op.matmul(rows, plain(8), False, True), 8))]
    return model_of(rows, *(reversed(made) if first else made))


def sum_of_activations() -> ov.Model:
    rows = input_rows()
    made = [heads(op.add(op.matmul(rows, plain(INNER), False, True), rows)) for _ in range(2)]
    return model_of(rows, *made)


def weights_that_something_else_reads() -> ov.Model:
    rows = input_rows()
    made = []
    for _ in range(2):
        weights = half(8)
        made += [heads(op.matmul(rows, weights, False, True)), op.gather(weights, op.constant(np.array([0])), op.constant(np.int64(0)))]
    return model_of(rows, *made)


def not_transposed() -> ov.Model:
    rows = input_rows()
    made = [heads(op.matmul(rows, op.constant(np.ones((INNER, 8), np.float32)), False, False)) for _ in range(2)]
    return model_of(rows, *made)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pair(plain(8), plain(8), after=op.swish),
        lambda: pair(plain(8), half(8)),
        lambda: pair(quantized(8), quantized(8, ov.Type.u4)),
        lambda: pair(quantized(8), quantized(8, one_zero_point=True)),
        lambda: one_bias_only(first=True),
        lambda: one_bias_only(first=False),
        sum_of_activations,
        weights_that_something_else_reads,
        not_transposed,
    ],
    ids=["function", "half and whole", "codes", "zero points", "first bias", "second bias", "sum", "shared weights", "not transposed"],
)
def test_what_is_unlike_stays_apart(make: Any) -> None:
    model = make()
    before = computed(model)
    assert merge_products(model) == 0
    assert products(model) == 2
    for one, other in zip(before, computed(model), strict=True):
        np.testing.assert_array_equal(one, other)
