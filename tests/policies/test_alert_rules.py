"""Alerts fire once and clear once, when they should: by a clock that tests move."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from headrace.claims import Claim, Room
from headrace.config import AlertSection
from headrace.policies.alert_rules import Alert, AlertBoard, AlertRules, BudgetUse, RequestCounts, duration
from headrace.policies.budget_watch import BudgetWatch

RULES = AlertRules.of(AlertSection())
WALL = 1_700_000_000.0
"""14 November 2023, 22:13:20 UTC."""


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return WALL + self.now - 1000.0


@dataclass
class Stand:
    rules: AlertRules = RULES
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.board = AlertBoard(self.rules, self.clock, self.clock.wall)

    def after(self, seconds: float, step: float = 1.0) -> list[Alert]:
        """What changes meanwhile."""
        changed = []
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now = min(end, self.clock.now + step)
            changed += self.board.changes()
        return changed


def names(alerts: list[Alert]) -> list[tuple[str, bool]]:
    return [(alert.name, alert.ended_at is None) for alert in alerts]


def test_an_engine_that_is_down_for_long_enough() -> None:
    stand = Stand()
    stand.board.engine("m", "It died.")
    assert stand.after(29) == []
    stand.board.engine("m", None)
    assert stand.after(100) == []
    stand.board.engine("m", "It died again.")
    fired = stand.after(100)
    assert names(fired) == [("HeadraceEngineDown", True)]
    assert fired[0].labels == (("model", "m"),)
    assert fired[0].description == "It died again."
    assert stand.board.firing == fired
    stand.board.engine("m", None)
    assert stand.after(29) == []
    stand.board.engine("m", "For a moment.")
    assert stand.after(10) == []
    stand.board.engine("m", None)
    cleared = stand.after(100)
    assert names(cleared) == [("HeadraceEngineDown", False)]
    assert cleared[0].started_at == fired[0].started_at < (cleared[0].ended_at or 0)
    assert stand.board.firing == []
    assert stand.after(100) == []


def test_each_model_is_an_alert_of_its_own() -> None:
    stand = Stand()
    stand.board.engine("a", "down")
    assert len(stand.after(31)) == 1
    stand.board.engine("b", "down")
    assert [alert.labels for alert in stand.after(31)] == [(("model", "b"),)]
    stand.board.engine("a", None)
    assert [alert.labels for alert in stand.after(31)] == [(("model", "a"),)]
    assert [alert.labels for alert in stand.board.firing] == [(("model", "b"),)]


def test_error_share() -> None:
    stand = Stand()
    stand.board.count(RequestCounts("m", requests=19, failed=19))
    assert stand.after(60) == []  # too few to say anything
    stand.board.count(RequestCounts("m", requests=81, failed=0))
    fired = stand.after(60)
    assert names(fired) == [("HeadraceErrorShareHigh", True)]
    assert fired[0].description == "19 of 100 requests of m failed in the last 5 minutes; more than 5.0% is an alert."
    # The window moves on.
    cleared = stand.after(400)
    assert names(cleared) == [("HeadraceErrorShareHigh", False)]


def test_exactly_the_share_is_none() -> None:
    stand = Stand()
    stand.board.count(RequestCounts("m", requests=100, failed=5))
    assert stand.after(100) == []
    stand.board.count(RequestCounts("m", requests=1, failed=1))
    assert names(stand.after(100)) == [("HeadraceErrorShareHigh", True)]


def test_what_belongs_to_no_model_is_counted() -> None:
    stand = Stand()
    stand.board.count(RequestCounts("", requests=20, failed=20))
    fired = stand.after(60)
    assert [(alert.name, alert.labels) for alert in fired] == [("HeadraceErrorShareHigh", ())]


def test_long_queues() -> None:
    stand = Stand()
    stand.board.count(RequestCounts("m", requests=20, queued=20, waited=2))
    assert stand.after(60) == []
    stand.board.count(RequestCounts("m", requests=1, queued=1, waited=1))
    fired = stand.after(60)
    assert names(fired) == [("HeadraceQueueTimeHigh", True)]
    assert fired[0].description == "3 of 21 requests of m waited for more than 30 s in the engine's queue, in the last 5 minutes."


def use(spent: int, budget: int = 1000, period: str = "day", subject: str = "key:key_1") -> BudgetUse:
    return BudgetUse(subject, budget, spent, period, name="shop", tenant="acme")  # type: ignore[arg-type]


def test_budget_at_80_percent() -> None:
    stand = Stand()
    stand.board.budget(use(799))
    assert stand.after(5) == []
    stand.board.budget(use(800))
    fired = stand.after(5)
    assert names(fired) == [("HeadraceBudgetNearlySpent", True)]
    assert dict(fired[0].labels) == {"key": "key_1", "key_name": "shop", "tenant": "acme", "period": "day"}
    assert fired[0].description == "800 of 1000 tokens are spent (80%); the alert is at 80%."
    stand.board.budget(use(950))
    assert stand.after(5) == []
    # At midnight, UTC, it is a new budget.
    assert stand.after(86_400 - WALL % 86_400 - 20, step=60) == []
    assert names(stand.after(20)) == [("HeadraceBudgetNearlySpent", False)]
    stand.board.budget(use(900))
    assert names(stand.after(5)) == [("HeadraceBudgetNearlySpent", True)]


def test_a_budget_that_was_raised_or_is_gone_clears() -> None:
    stand = Stand()
    stand.board.budget(use(800, period="total"))
    stand.board.budget(use(800, period="total", subject="tenant:acme"))
    assert len(stand.after(5)) == 2
    assert stand.after(86_400 * 40, step=86_400) == []
    stand.board.budget(use(800, budget=2000, period="total"))
    assert [alert.labels[0] for alert in stand.after(5)] == [("key", "key_1")]
    assert [budget.subject for budget in stand.board.budgets] == ["tenant:acme"]
    stand.board.forget_budget("tenant:acme")
    assert names(stand.after(5)) == [("HeadraceBudgetNearlySpent", False)]


def test_no_budget_at_all_is_not_nearly_spent() -> None:
    assert not RULES.nearly_spent(0, 0)
    assert RULES.nearly_spent(1, 1)


@given(st.integers(1, 10**12), st.floats(0.001, 1))
def test_nearly_spent_is_what_the_share_says(budget: int, share: float) -> None:
    rules = AlertRules.of(AlertSection(alert_budget_share=share))
    first = next(spent for spent in range(max(0, int(share * budget) - 2), budget + 1) if rules.nearly_spent(spent, budget))
    assert abs(first - share * budget) <= 1
    assert rules.nearly_spent(budget, budget)
    assert not rules.nearly_spent(first - 1, budget)


events = st.one_of(
    st.tuples(st.just("wait"), st.floats(0.1, 90)),
    st.tuples(st.just("requests"), st.tuples(st.sampled_from("ab"), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))),
    st.tuples(st.just("engine"), st.tuples(st.sampled_from("ab"), st.booleans())),
    st.tuples(st.just("budget"), st.tuples(st.sampled_from("ab"), st.integers(0, 1000))),
)


@given(st.lists(events, max_size=80))
def test_whatever_happens_an_alert_fires_and_clears_in_turns(happened: list[tuple[str, object]]) -> None:
    stand = Stand()
    firing: dict[tuple[str, object], Alert] = {}

    def follow(changes: list[Alert]) -> None:
        for alert in changes:
            key = alert.name, alert.labels
            if alert.ended_at is None:
                assert key not in firing
                firing[key] = alert
            else:
                fired = firing.pop(key)
                assert fired.started_at == alert.started_at <= alert.ended_at
                assert (fired.summary, fired.description) == (alert.summary, alert.description)
        assert {(alert.name, alert.labels) for alert in stand.board.firing} == set(firing)

    for what, detail in happened:
        if what == "wait":
            assert isinstance(detail, float)
            follow(stand.after(detail, step=7))
            continue
        assert isinstance(detail, tuple)
        if what == "requests":
            model, requests, failed, waited = detail
            counts = RequestCounts(model, requests, int(failed * requests), requests, int(waited * requests))
            stand.board.count(counts)
        elif what == "engine":
            model, down = detail
            stand.board.engine(model, "down" if down else None)
        else:
            name, spent = detail
            stand.board.budget(use(spent, subject=f"tenant:{name}"))
        follow(stand.board.changes())
    # With nothing more, everything clears but what is still so.
    for model in "ab":
        stand.board.engine(model, None)
        stand.board.forget_budget(f"tenant:{model}")
    follow(stand.after(1000, step=7))
    assert firing == {}


def test_the_watch_tells_of_each_side_once() -> None:
    told: list[tuple[str, int | None, int]] = []
    clock = Clock()
    watch = BudgetWatch(RULES, lambda claim, spent: told.append((claim.subject, claim.budget, spent)), clock.wall)
    claim = Claim("key:1", budget=1000, period="day")
    for spent in (0, 100, 799):
        watch.seen(claim, Room(spent=spent, held=900))
    assert told == [("key:1", 1000, 0)]
    for spent in (800, 900, 1000):
        watch.seen(claim, Room(spent=spent))
    assert told[1:] == [("key:1", 1000, 800)]
    watch.seen(Claim("key:1", budget=2000, period="day"), Room(spent=1000))
    assert told[2:] == [("key:1", 2000, 1000)]
    # A day later it is another day's budget.
    watch.seen(claim, Room(spent=1000))
    clock.now += 86_400
    watch.seen(claim, Room(spent=1000))
    assert told[3:] == [("key:1", 1000, 1000)] * 2
    watch.seen(Claim("tenant:t", requests=5), Room())
    assert len(told) == 5


def test_durations_are_words() -> None:
    assert [duration(seconds) for seconds in (0.5, 30, 60, 300, 90)] == ["0.5 s", "30 s", "minute", "5 minutes", "90 s"]
