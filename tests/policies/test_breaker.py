from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from headrace.policies.breaker import Breaker, BreakerRules

RULES = BreakerRules(window=10.0, failure_share=0.5, min_calls=4, open_seconds=5.0, probes=2)


def opened(now: float = 100.0) -> Breaker:
    breaker = Breaker(RULES)
    breaker.note(0, 4, 4, now)
    assert breaker.state == "open"
    return breaker


def half_open(now: float = 100.0) -> Breaker:
    breaker = opened(now - RULES.open_seconds)
    breaker.advance(now)
    assert breaker.state == "half_open"
    return breaker


def test_it_opens_at_the_share_and_not_before_there_are_enough_calls() -> None:
    breaker = Breaker(RULES)
    breaker.note(0, 3, 3, 0.0)
    assert breaker.state == "closed"
    breaker.note(0, 4, 0, 1.0)
    assert breaker.state == "closed"
    breaker.note(0, 1, 1, 2.0)
    assert breaker.state == "open"
    assert breaker.wait(4.0) == 3.0


def test_failures_leave_the_window() -> None:
    breaker = Breaker(RULES)
    breaker.note(0, 3, 3, 0.0)
    breaker.note(0, 1, 1, 10.0)
    assert breaker.state == "closed"
    breaker.note(0, 3, 1, 19.9)
    assert breaker.state == "open", "two of four within ten seconds"


def test_success_alone_never_opens_it() -> None:
    breaker = Breaker(RULES)
    breaker.note(0, 3, 3, 0.0)
    breaker.note(0, 1, 0, 0.0)
    assert breaker.state == "closed", "only a failure is a reason to open"


def test_a_fixed_number_of_probes_and_all_have_to_succeed() -> None:
    breaker = half_open()
    one, two = breaker.probe("a", 100.0), breaker.probe("b", 100.0)
    assert one is not None
    assert two is not None
    assert breaker.probe("a", 100.0) is None
    breaker.probed(one, True, 101.0)
    assert breaker.probe("a", 101.0) is None, "one has succeeded and one is under way: that makes two"
    breaker.probed(two, True, 101.0)
    assert breaker.state == "closed"


def test_a_probe_that_fails_opens_it_again_for_as_long() -> None:
    breaker = half_open()
    one, two = breaker.probe("a", 100.0), breaker.probe("a", 100.0)
    assert one is not None
    assert two is not None
    breaker.probed(one, False, 102.0)
    assert breaker.state == "open"
    assert breaker.wait(102.0) == 5.0
    breaker.probed(two, True, 103.0)
    assert breaker.state == "open", "what began before says nothing now"


def test_probes_without_a_result_go_to_the_next() -> None:
    breaker = half_open()
    one, two = breaker.probe("a", 100.0), breaker.probe("b", 100.0)
    assert one is not None
    assert two is not None
    breaker.probed(one, None, 100.0)
    breaker.lapse("b")
    assert breaker.state == "half_open"
    assert breaker.probe("c", 100.0) is not None
    assert breaker.probe("c", 100.0) is not None
    assert breaker.probe("c", 100.0) is None


def test_calls_of_another_epoch_are_not_counted() -> None:
    breaker = half_open()
    for _ in range(RULES.probes):
        number = breaker.probe("a", 100.0)
        assert number is not None
        breaker.probed(number, True, 100.0)
    assert breaker.state == "closed"
    assert breaker.epoch == 3
    breaker.note(0, 50, 50, 101.0)
    assert breaker.state == "closed"
    breaker.note(3, 4, 4, 101.0)
    assert breaker.state == "open"


@dataclass
class Reference:
    """The rules, said in the plainest way."""

    state: str = "closed"
    since: float = 0.0
    calls: list[tuple[float, bool]] = field(default_factory=list)
    probing: dict[int, str] = field(default_factory=dict)
    passed: int = 0

    def turn(self, state: str, now: float) -> None:
        self.state, self.since, self.calls, self.probing, self.passed = state, now, [], {}, 0


Deed = tuple[str, int, int]
deeds = st.lists(
    st.tuples(
        st.floats(0.0, 7.0, allow_nan=False),
        st.one_of(
            st.tuples(st.just("note"), st.integers(1, 6), st.integers(0, 6)),
            st.tuples(st.just("stale"), st.integers(1, 6), st.just(6)),
            st.tuples(st.just("probe"), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("probed"), st.integers(0, 5), st.integers(-1, 1)),
            st.tuples(st.just("lapse"), st.integers(0, 2), st.just(0)),
        ),
    ),
    max_size=60,
)


@given(deeds)
def test_it_does_what_the_rules_say(script: list[tuple[float, Deed]]) -> None:
    breaker, plain, now, numbers = Breaker(RULES), Reference(), 0.0, list[int]()
    for pause, (deed, one, two) in script:
        now += pause
        if plain.state == "open" and now >= plain.since + RULES.open_seconds:
            plain.turn("half_open", now)
        breaker.advance(now)
        epoch = breaker.epoch
        if deed == "note":
            failures = min(one, two)
            breaker.note(epoch, one, failures, now)
            if plain.state == "closed":
                plain.calls += [(now, place < failures) for place in range(one)]
                recent = [failed for at, failed in plain.calls if at > now - RULES.window]
                if failures and len(recent) >= RULES.min_calls and sum(recent) >= RULES.failure_share * len(recent):
                    plain.turn("open", now)
        elif deed == "stale":
            breaker.note(epoch - 1, one, one, now)
        elif deed == "probe":
            number = breaker.probe(f"p{one}", now)
            allowed = plain.state == "half_open" and plain.passed + len(plain.probing) < RULES.probes
            assert (number is not None) == allowed
            if number is not None:
                numbers.append(number)
                plain.probing[number] = f"p{one}"
        elif deed == "probed" and numbers:
            number = numbers[one % len(numbers)]
            result = None if two < 0 else bool(two)
            breaker.probed(number, result, now)
            if plain.probing.pop(number, None) is not None:
                if result is False:
                    plain.turn("open", now)
                elif result:
                    plain.passed += 1
                    if plain.passed == RULES.probes:
                        plain.turn("closed", now)
        elif deed == "lapse":
            breaker.lapse(f"p{one}")
            plain.probing = {number: holder for number, holder in plain.probing.items() if holder != f"p{one}"}
        assert breaker.state == plain.state
        assert breaker.wait(now) == (max(0.0, plain.since + RULES.open_seconds - now) if plain.state == "open" else 0.0)
