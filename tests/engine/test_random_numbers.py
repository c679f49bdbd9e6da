from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from headrace.engine.random_numbers import stream_key, uniform


@given(st.integers(), st.integers(0, 15), st.integers(0, 2**40))
def test_in_the_unit_interval_and_a_function_of_its_arguments(seed: int, choice: int, position: int) -> None:
    number = uniform(stream_key(seed, choice), position)
    assert 0 <= number < 1
    assert number == uniform(stream_key(seed % 2**64, choice), position)


def test_uniform_along_seeds_choices_and_positions() -> None:
    along = {
        "positions": [uniform(stream_key(0, 0), position) for position in range(20_000)],
        "seeds": [uniform(stream_key(seed, 0), 0) for seed in range(20_000)],
        "choices": [uniform(stream_key(0, choice), 0) for choice in range(20_000)],
    }
    for name, numbers in along.items():
        assert kstest(numbers, "uniform").pvalue > 1e-4, name
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03, name
    assert max(abs(np.corrcoef(along[a], along[b])[0, 1]) for a, b in (("positions", "seeds"), ("positions", "choices"))) < 0.03


def test_the_first_numbers_of_a_seed_never_change() -> None:
    """Published numbers: a seed gives the same text in the next release."""
    assert [round(uniform(stream_key(42, 0), position), 6) for position in range(3)] == [0.772056, 0.381651, 0.705846]
