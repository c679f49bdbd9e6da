"""When an alert fires and when it clears: error share, queue time, engine down, budget nearly spent. Time comes in, changes go out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from headrace.claims import period_end
from headrace.config import AlertSection
from headrace.records import BudgetPeriod

QUEUED_SHARE = 0.1
"""Share of requests that wait in the queue for long at which it is an alert: their 90th percentile is above the threshold then."""
PARTS = 30
"""A window moves on by this fraction of itself."""
HELD = 10
"""A share has to be over its threshold, or under it again, for this fraction of the window: at the threshold itself nothing flaps."""

Severity = Literal["critical", "warning"]
Labels = tuple[tuple[str, str], ...]


class RequestCounts(msgspec.Struct):
    """Requests of one model that are over, since the last such report. It crosses the socket to the supervisor."""

    model: str
    """Its public name; empty where no model was found."""
    requests: int = 0
    failed: int = 0
    """By the server's fault."""
    queued: int = 0
    """Those of which the time in the engine's queue is known."""
    waited: int = 0
    """Of these, the ones that waited for longer than `alert_queue_seconds`."""
    begun: int = 0
    """Those that got a first token from the engine."""
    first_seconds: float = 0.0
    """Added up over these, the seconds until then."""


@dataclass(frozen=True, slots=True)
class BudgetUse:
    """How a key or a tenant stands with its budget of tokens."""

    subject: str
    """`key:ID` or `tenant:NAME`."""
    budget: int
    spent: int
    period: BudgetPeriod
    name: str = ""
    """The key's, as the operator called it."""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class AlertRules:
    error_share: float
    window: float
    min_requests: int
    queue_seconds: float
    engine_down_seconds: float
    budget_share: float

    @classmethod
    def of(cls, section: AlertSection) -> AlertRules:
        return cls(
            section.alert_error_share,
            section.alert_window,
            section.alert_min_requests,
            section.alert_queue_seconds,
            section.alert_engine_down_seconds,
            section.alert_budget_share,
        )

    def nearly_spent(self, spent: int, budget: int) -> bool:
        """A budget of nothing is never nearly spent: it was never there."""
        return budget > 0 and spent >= math.ceil(round(self.budget_share * budget, 6))


@dataclass(frozen=True, slots=True)
class Alert:
    """One that fires, or, with `ended_at`, one that has cleared. Times are Unix time."""

    name: str
    severity: Severity
    labels: Labels
    """Without the name and the severity; sorted."""
    summary: str
    description: str
    started_at: float
    ended_at: float | None = None


@dataclass(slots=True)
class _Window:
    """Counts of the last `seconds`, in parts."""

    parts: deque[tuple[int, RequestCounts]] = field(default_factory=deque)

    def add(self, counts: RequestCounts, part: int) -> None:
        if not self.parts or self.parts[-1][0] != part:
            self.parts.append((part, RequestCounts(counts.model)))
        kept = self.parts[-1][1]
        kept.requests += counts.requests
        kept.failed += counts.failed
        kept.queued += counts.queued
        kept.waited += counts.waited

    def total(self, part: int) -> RequestCounts:
        while self.parts and self.parts[0][0] <= part - PARTS:
            self.parts.popleft()
        every = [counts for _, counts in self.parts]
        return RequestCounts(
            "",
            sum(counts.requests for counts in every),
            sum(counts.failed for counts in every),
            sum(counts.queued for counts in every),
            sum(counts.waited for counts in every),
        )


@dataclass(slots=True)
class _Condition:
    """What is known of one possible alert."""

    turned_at: float | None = None
    """Since when it is other than the alert says: true while nothing fires, false while it fires."""
    firing: Alert | None = None


@dataclass(frozen=True, slots=True)
class _Finding:
    name: str
    labels: Labels
    severity: Severity
    held: float
    """Seconds that it has to be true to fire, and not true to clear."""
    summary: str
    description: str


class AlertBoard:
    """All alerts of one server. `clock` is monotonic and says for how long things are true; `wall` is Unix time, for what is told."""

    def __init__(self, rules: AlertRules, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self.rules = rules
        self._clock = clock
        self._wall = wall
        self._windows: dict[str, _Window] = {}
        self._down: dict[str, str] = {}
        self._budgets: dict[str, tuple[BudgetUse, float | None]] = {}
        self._conditions: dict[tuple[str, Labels], _Condition] = {}
        self._held: dict[str, float] = {}

    @property
    def firing(self) -> list[Alert]:
        return [condition.firing for condition in self._conditions.values() if condition.firing is not None]

    @property
    def budgets(self) -> list[BudgetUse]:
        """Those nearly spent."""
        return [use for use, _ in self._budgets.values()]

    def judge_by(self, rules: AlertRules) -> None:
        """Other thresholds from here on. Over another window everything is counted anew."""
        if rules.window != self.rules.window:
            self._windows.clear()
        self.rules = rules

    def count(self, counts: RequestCounts) -> None:
        """Requests that are over."""
        self._windows.setdefault(counts.model, _Window()).add(counts, self._part())

    def engine(self, model: str, down: str | None) -> None:
        """Why a model's engine can't be used; None if it can."""
        if down is None:
            self._down.pop(model, None)
        else:
            self._down[model] = down

    def budget(self, use: BudgetUse) -> None:
        """The latest word on a budget; it holds until the budget's period ends."""
        if self.rules.nearly_spent(use.spent, use.budget):
            self._budgets[use.subject] = use, period_end(use.period, self._wall())
        else:
            self._budgets.pop(use.subject, None)

    def forget_budget(self, subject: str) -> None:
        """Its key or tenant is no more, or has no budget any more."""
        self._budgets.pop(subject, None)

    def changes(self) -> list[Alert]:
        """What has begun to fire and what has cleared since it was last asked."""
        now, wall = self._clock(), self._wall()
        found = {(finding.name, finding.labels): finding for finding in self._findings(wall)}
        changed = []
        for key in [*found, *(key for key in self._conditions if key not in found)]:
            finding = found.get(key)
            condition = self._conditions.setdefault(key, _Condition())
            if finding is not None:
                self._held[finding.name] = finding.held
            if (finding is not None) == (condition.firing is not None):
                condition.turned_at = None
                if finding is None:
                    del self._conditions[key]
                continue
            if condition.turned_at is None:
                condition.turned_at = now
            if now - condition.turned_at < self._held[key[0]]:
                continue
            condition.turned_at = None
            if finding is not None:
                condition.firing = Alert(finding.name, finding.severity, finding.labels, finding.summary, finding.description, wall)
                changed.append(condition.firing)
            elif condition.firing is not None:
                fired = condition.firing
                changed.append(
                    Alert(
                        fired.name,
                        fired.severity,
                        fired.labels,
                        fired.summary,
                        fired.description,
                        fired.started_at,
                        max(wall, fired.started_at),
                    )
                )
                del self._conditions[key]
        return changed

    def _part(self) -> int:
        return math.floor(self._clock() / self.rules.window * PARTS)

    def _findings(self, wall: float) -> Iterable[_Finding]:
        """What is true now."""
        rules, part = self.rules, self._part()
        held = rules.window / HELD
        for model, window in list(self._windows.items()):
            total = window.total(part)
            if not window.parts:
                del self._windows[model]
            labels = (("model", model),) if model else ()
            of = f" of {model}" if model else ""
            if total.requests >= rules.min_requests and total.failed > rules.error_share * total.requests:
                said = f"{total.failed} of {total.requests} requests{of} failed in the last {duration(rules.window)}"
                threshold = f"more than {rules.error_share:.1%} is an alert."
                yield _Finding("HeadraceErrorShareHigh", labels, "critical", held, f"Requests{of} fail", f"{said}; {threshold}")
            if total.queued >= rules.min_requests and total.waited > QUEUED_SHARE * total.queued:
                waited = f"{total.waited} of {total.queued} requests{of} waited for more than {duration(rules.queue_seconds)}"
                said = f"{waited} in the engine's queue, in the last {duration(rules.window)}."
                yield _Finding("HeadraceQueueTimeHigh", labels, "warning", held, f"Requests{of} wait long", said)
        for model, reason in self._down.items():
            labels = (("model", model),)
            yield _Finding("HeadraceEngineDown", labels, "critical", rules.engine_down_seconds, f"The engine of {model} is down", reason)
        for subject, (use, ends) in list(self._budgets.items()):
            if (ends is not None and wall >= ends) or not rules.nearly_spent(use.spent, use.budget):
                del self._budgets[subject]
                continue
            yield _budget_finding(use, rules.budget_share)


def _budget_finding(use: BudgetUse, share: float) -> _Finding:
    kind, _, id = use.subject.partition(":")
    labels = {"period": use.period, kind: id}
    if kind == "key" and use.name:
        labels["key_name"] = use.name
    if use.tenant:
        labels["tenant"] = use.tenant
    whose = f"{kind} {use.name or id}"
    of = {"day": "today's budget", "month": "this month's budget", "total": "the budget"}[use.period]
    said = f"{use.spent} of {use.budget} tokens are spent ({use.spent / use.budget:.0%}); the alert is at {share:.0%}."
    return _Finding("HeadraceBudgetNearlySpent", tuple(sorted(labels.items())), "warning", 0.0, f"Most of {of} of {whose} is spent", said)


def duration(seconds: float) -> str:
    """In words, for people: `5 minutes`, `30 s`."""
    if seconds >= 60 and seconds % 60 == 0:
        minutes = int(seconds // 60)
        return f"{minutes} minutes" if minutes > 1 else "minute"
    return f"{seconds:g} s"
