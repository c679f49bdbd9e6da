from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from headrace.models.gguf_weights import BLOCK, FINER, _apart, finer, read_q4_1, read_q4_k


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


@pytest.mark.parametrize(("first", "last"), [(5, 6), (-6, -5), (0.01, 10), (3, 3)])
def test_blocks_off_zero_get_a_coarser_scale(first: float, last: float) -> None:
    values = np.linspace(first, last, BLOCK, dtype=np.float32)[None]
    data = quantize(values, GGMLQuantizationType.Q4_1)
    codes, zero_points, scale = finer(read_q4_1(data, 1))
    got = scale.astype(np.float32) * (codes.astype(np.float32) - zero_points)
    assert np.abs(got - dequantize(data, GGMLQuantizationType.Q4_1).reshape(got.shape)).max() <= np.abs(values).max() / 254


@given(st.integers(0, 2**32 - 1), st.floats(1e-5, 1e-2), st.floats(1e-5, 1e-2))
def test_superblocks_are_read_as_ggml_reads_them(seed: int, scale: float, offset: float) -> None:
    data = np.random.default_rng(seed).integers(0, 256, (3, 2 * 144), dtype=np.uint8)
    data.reshape(-1, 144)[:, :4] = np.array([scale, offset], np.float16).view(np.uint8)
    want = dequantize(data, GGMLQuantizationType.Q4_K).reshape(3, -1, BLOCK)
    blocks = read_q4_k(data, 3)
    assert np.array_equal(blocks.scale[..., None] * blocks.codes + blocks.offset[..., None], want)
    codes, zero_points, finer_scale = finer(blocks)
    got = finer_scale.astype(np.float32) * (codes.astype(np.float32) - zero_points)
    reach = np.maximum(want.max(axis=-1), 0) - np.minimum(want.min(axis=-1), 0)
    coarsest = np.maximum(blocks.scale / FINER, reach / 254)[..., None]
    # Scales below 6e-5 are inexact in float16, by 3e-8: of that, the codes' 255 steps make 8e-6.
    assert (np.abs(got - want) <= coarsest * 1.1 + 8e-6).all()


def test_a_constant_block_has_no_scale() -> None:
    codes, _, scale = finer(read_q4_1(quantize(np.zeros((1, BLOCK), np.float32), GGMLQuantizationType.Q4_1), 1))
    assert (scale.item(), codes.max()) == (0, 0)


def test_heads_are_put_apart() -> None:
    """Rows of two heads of four, interleaved in halves, as llama.cpp keeps them."""
    interleaved = np.array([0, 2, 1, 3, 4, 6, 5, 7])
    assert _apart(interleaved[:, None], 2)[:, 0].tolist() == list(range(8))
