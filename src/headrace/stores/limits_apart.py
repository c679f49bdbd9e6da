"""A process's share of the limits while the place that all share is away."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headrace.claims import Ask, Charge, Claim, Extend, Extended, Reply, Room, Settle, Take, Taken
from headrace.stores.limit_table import LimitTable

MOST_EARLIER = 10_000


class LimitsApart:
    """Of every limit one of `processes` parts, beginning with that part of what was last known.

    All processes together then admit at most what one could have, and each that counted wrong at most one bucket more.
    """

    def __init__(self, processes: int, known: Callable[[Claim], tuple[Room, bool] | None]) -> None:
        """`known`: how a claim stood when it was last heard of, and whether that was before an earlier absence."""
        self._parts = max(1, processes)
        self._known = known
        self._table = LimitTable()
        self._begun: set[str] = set()
        self._earlier: set[str] = set()
        """Of earlier absences, whose shares are void once something is heard of their subjects."""

    def begin(self) -> None:
        """The place went away just now."""
        self._earlier |= self._begun
        self._begun.clear()
        if len(self._earlier) > MOST_EARLIER:
            self._earlier.clear()

    def answer(self, ask: Ask, admitted: Take | None = None) -> Reply:
        """As the place would. `admitted`: the request that an `Extend` belongs to, wherever it was admitted."""
        if isinstance(ask, Take):
            return self._table.answer(self._shared(ask))
        if isinstance(ask, Charge):
            shared = self._shared(Take(ask.id, ask.claims, 0, 0, 0))
            return self._table.answer(Charge(ask.id, shared.claims, ask.requests, ask.used))
        if isinstance(ask, Extend) and ask.id not in self._table:
            return self._lease_of_another(ask, admitted)
        return self._table.answer(ask)

    def _lease_of_another(self, ask: Extend, admitted: Take | None) -> Reply:
        """More output for a request that the place has admitted. The lease is given back as used: it can't be known how much of it was."""
        if admitted is None:
            return Extended(0)
        further = Take(f"{ask.id}+", admitted.claims, 0, ask.tokens, 0, 0)
        shared = self._shared(further)
        budgets = tuple(msgspec.structs.replace(claim, requests=None, tokens=None, concurrency=None) for claim in shared.claims)
        reply = self._table.answer(msgspec.structs.replace(shared, claims=budgets))
        if not isinstance(reply, Taken):
            return Extended(0)
        self._table.answer(Settle(f"{ask.id}+", reply.granted))
        return Extended(reply.granted)

    def _shared(self, take: Take) -> Take:
        seeds: list[int | None] = list(take.seeds) or [None] * len(take.claims)
        claims = []
        for which, claim in enumerate(take.claims):
            part = msgspec.structs.replace(
                claim, requests=self._part(claim.requests), tokens=self._part(claim.tokens), concurrency=self._part(claim.concurrency)
            )
            claims.append(part)
            if claim.subject in self._begun:
                continue
            heard = self._known(claim)
            if heard is None or heard[1]:
                if claim.subject in self._earlier:
                    # Nothing is known that wasn't then: what was left of that share is left now.
                    self._begun.add(claim.subject)
                    continue
            else:
                self._earlier.discard(claim.subject)
            room = None if heard is None else heard[0]
            spent = 0
            if claim.budget is not None:
                if room is not None:
                    spent = claim.budget - max(0, claim.budget - room.spent - room.held) // self._parts
                elif (seed := seeds[which]) is not None:
                    spent = claim.budget - max(0, claim.budget - seed) // self._parts
                else:
                    # Nothing is known of its budget: the table asks for it.
                    continue
            self._begun.add(claim.subject)
            level = Room(claim.requests or 0, claim.tokens or 0) if room is None else room
            self._table.know(part, Room(level.requests / self._parts, level.tokens / self._parts, spent))
        return Take(take.id, tuple(claims), take.prompt, take.output, take.least, take.requests, tuple(seeds))

    def _part(self, limit: int | None) -> int | None:
        return None if limit is None else -(-limit // self._parts)
