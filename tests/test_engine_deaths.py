"""How much it takes to convict a request of killing engines, by what became of the suspects of other deaths."""

from __future__ import annotations

from typing import cast

import pytest

from headrace.engine.step_notes import LastStep, digest
from headrace.engine_deaths import LONE_DEATHS, MOST_MORE, REMEMBERED, Death, Deaths
from headrace.engine_streams import MAX_SUBMISSIONS, EngineStream, Home
from headrace.types import GenerateRequest, Sampling


class Request:
    def __init__(self) -> None:
        self.deaths: list[Death] = []

    def gets_on(self) -> None:
        cleared, self.deaths = self.deaths, []
        for death in cleared:
            death.cleared()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_death_all_of_whose_suspects_got_on_was_somebody_elses_doing() -> None:
    deaths = Deaths(Clock())
    one, other = Request(), Request()
    deaths.died([one, other])
    one.gets_on()
    assert deaths.to_convict == LONE_DEATHS, "it may have been the other"
    other.gets_on()
    assert deaths.to_convict == LONE_DEATHS + 1


def test_a_request_that_does_kill_explains_its_deaths() -> None:
    deaths = Deaths(Clock())
    killer = Request()
    for _ in range(5):
        innocent = Request()
        deaths.died([killer, innocent])
        innocent.gets_on()
    deaths.died([])
    assert deaths.to_convict == LONE_DEATHS


def test_what_is_known_of_others_is_bounded_and_forgotten() -> None:
    clock = Clock()
    deaths = Deaths(clock)
    for _ in range(20):
        request = Request()
        deaths.died([request])
        request.gets_on()
    assert deaths.to_convict == LONE_DEATHS + MOST_MORE
    assert deaths.from_outside
    clock.now += REMEMBERED + 1
    assert deaths.to_convict == LONE_DEATHS
    assert not deaths.from_outside


@pytest.mark.parametrize(("from_outside", "deaths"), [(False, 1), (True, MAX_SUBMISSIONS)])
def test_where_somebody_kills_engines_it_takes_more_to_be_a_suspect(from_outside: bool, deaths: int) -> None:
    request = GenerateRequest(id="r", prompt=[1, 2, 3], sampling=Sampling(max_tokens=4))
    stream = EngineStream(request, cast(Home, None), 1, 0.0)
    for _ in range(deaths):
        assert not stream.suspect
        stream.outlived(LastStep({digest("r"): (0, 3)}, 0), from_outside=from_outside)
    assert stream.suspect


def test_who_got_nothing_from_the_most_engines_goes_first() -> None:
    one, other = (
        EngineStream(GenerateRequest(id=name, prompt=[1], sampling=Sampling(max_tokens=4)), cast(Home, None), 1, 0.0) for name in "ab"
    )
    last = LastStep({}, 0)
    other.outlived(last)
    other.outlived(last)
    one.outlived(last)
    assert sorted([one, other], key=lambda stream: stream.turn) == [other, one]
