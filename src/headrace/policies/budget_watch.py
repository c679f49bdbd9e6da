"""Notices in an API process when a budget is nearly spent, and when it isn't any more."""

from __future__ import annotations

from collections.abc import Callable

from headrace.claims import Claim, Room, period_start
from headrace.policies.alert_rules import AlertRules

KNOWN = 10_000
"""Subjects that are remembered; those told of longest ago are told of again."""


class BudgetWatch:
    """`tell` hears of each budget once for every side of the threshold, and once in every period. Each process has its own watch, so the
    same thing may be told by several."""

    def __init__(self, rules: AlertRules, tell: Callable[[Claim, int], None], wall: Callable[[], float]) -> None:
        self._rules = rules
        self._tell = tell
        self._wall = wall
        self._told: dict[str, tuple[int, float | None]] = {}

    def seen(self, claim: Claim, room: Room) -> None:
        """How a claim with a budget stands now. Called for every request."""
        budget = claim.budget
        if budget is None:
            return
        since = period_start(claim.period, self._wall()) if self._rules.nearly_spent(room.spent, budget) else None
        # A process that sees a raised budget first may not be the one that told of the old one.
        standing = budget, since
        if self._told.get(claim.subject) == standing:
            return
        self._told.pop(claim.subject, None)
        self._told[claim.subject] = standing
        if len(self._told) > KNOWN:
            del self._told[next(iter(self._told))]
        self._tell(claim, room.spent)
