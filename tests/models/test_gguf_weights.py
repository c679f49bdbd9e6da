from __future__ import annotations

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from headrace.models.gguf_weights import BLOCK, FINER, _apart, finer, read_q4_1


@given(st.integers(0, 2**32 - 1), st.floats(-0.9, 0.9), st.floats(0.05, 10))
def test_eight_bit_codes_say_what_the_file_says(seed: int, shift: float, size: float) -> None:
    """Within half a sixteenth of a step, for blocks that reach across zero, as weights do."""
    values = (np.random.default_rng(seed).uniform(-1, 1, (6, 4 * BLOCK)) + shift) * size
    values[:, ::BLOCK], values[:, 1::BLOCK] = -size, size
    data = quantize(values.astype(np.float32), GGMLQuantizationType.Q4_1)
    blocks = read_q4_1(data, 6)
    codes, zero_points, scale = finer(blocks)
    assert (codes % FINER == 0).all()
    got = scale.astype(np.float32) * (codes.astype(np.float32) - zero_points)
    want = dequantize(data, GGMLQuantizationType.Q4_1).reshape(got.shape)
    allowed = blocks.scale[..., None] / (2 * FINER) * 1.01 + np.abs(want) * 2e-3
    assert (np.abs(got - want) <= allowed).all()


def test_blocks_that_do_not_reach_zero_are_met_as_nearly_as_can_be() -> None:
    data = quantize(np.linspace(5, 6, BLOCK, dtype=np.float32)[None], GGMLQuantizationType.Q4_1)
    _, zero_points, _ = finer(read_q4_1(data, 1))
    assert zero_points.item() == 0


def test_a_constant_block_has_no_scale() -> None:
    codes, _, scale = finer(read_q4_1(quantize(np.zeros((1, BLOCK), np.float32), GGMLQuantizationType.Q4_1), 1))
    assert (scale.item(), codes.max()) == (0, 0)


def test_heads_are_put_apart() -> None:
    """Rows of two heads of four, interleaved in halves, as llama.cpp keeps them."""
    interleaved = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    assert _apart(interleaved[:, None], 2)[:, 0].tolist() == list(range(8))
