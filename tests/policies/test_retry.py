from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import (
    BadRequest,
    CircuitOpen,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    Overloaded,
    RateLimited,
    RequestFailed,
    UpstreamError,
)
from headrace.policies.retry import FIRST_PAUSE, LONGEST_PAUSE, RetryBudget, may_help, pause


@given(st.floats(0, 1), st.integers(0, 20), st.lists(st.booleans(), max_size=300))
def test_retries_are_at_most_a_share_of_the_requests_and_a_constant(share: float, reserve: int, script: list[bool]) -> None:
    budget, requests, retries = RetryBudget(share, reserve), 0, 0
    for is_request in script:
        if is_request:
            budget.earn()
            requests += 1
        else:
            retries += budget.spend()
        assert retries <= share * requests + reserve + 1e-3


def test_every_tenth_request_earns_a_retry() -> None:
    budget = RetryBudget(0.1, 0)
    for _ in range(20):
        budget.earn()
    assert [budget.spend() for _ in range(3)] == [True, True, False]


def test_quiet_days_save_up_only_so_much() -> None:
    budget = RetryBudget(1.0, 0)
    for _ in range(10_000):
        budget.earn()
    assert sum(budget.spend() for _ in range(10_000)) == 100


@pytest.mark.parametrize(
    ("error", "helps"),
    [
        (UpstreamError("x"), True),
        (Overloaded("x"), True),
        (RateLimited("x"), True),
        (EngineUnavailable("x"), True),
        (EngineDied("the client has submitted it again already"), False),
        (CircuitOpen("x"), False),
        (BadRequest("x"), False),
        (RequestFailed("x"), False),
        (DeadlineExceeded("x"), False),
    ],
)
def test_what_a_retry_can_help(error: HeadraceError, helps: bool) -> None:
    assert may_help(error) is helps


@given(st.integers(0, 50), st.integers())
def test_the_pause_is_drawn_from_the_whole_of_a_growing_interval(retry: int, seed: int) -> None:
    most = min(LONGEST_PAUSE, FIRST_PAUSE * 2**retry)
    seconds = pause(retry, None, random.Random(seed))
    assert seconds is not None
    assert 0 <= seconds <= most


def test_the_engine_says_when() -> None:
    draw = random.Random(1)
    seconds = pause(0, 1.0, draw)
    assert seconds is not None
    assert 1.0 <= seconds <= 1.0 + FIRST_PAUSE
    assert pause(0, 60.0, draw) is None
    drawn = sorted(pause(3, None, draw) or 0.0 for _ in range(200))
    assert drawn[20] < 0.2, "full jitter: from nothing"
    assert drawn[180] > 0.6, "to all of it"
