"""How much it takes to convict a request of killing engines, by what became of the suspects of other deaths."""

from __future__ import annotations

from headrace.engine_deaths import LONE_DEATHS, MOST_MORE, REMEMBERED, Death, Deaths


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
