"""The default model serves the weights of its GGUF file."""

from __future__ import annotations

import numpy as np
import pytest
from reference_model import GgufModel, Matrices

pytestmark = pytest.mark.slow


def test_every_matrix_is_within_a_thirty_second_of_a_step(gguf_model: GgufModel, served_matrices: Matrices) -> None:
    _, weights = gguf_model
    assert len(served_matrices) == 7 * 30 + 1
    for name, matrix in served_matrices.items():
        exact = weights[name].reshape(-1, 32)
        step = np.ptp(exact, axis=1, keepdims=True) / 15
        # Q8_0 (the embedding) is exact; of Q4_1 a block's offset is off by half a sixteenth of a step, and scales are float16.
        allowed = step / 32 + np.abs(exact) * 2e-3 + 1e-7
        assert (np.abs(matrix.reshape(-1, 32) - exact) <= allowed).all(), name
