"""Fair sharing between tenants, by tokens served.

The virtual token counter of Sheng et al., «Fairness in Serving Large Language Models», OSDI 2024: each tenant's
counter grows by what it is served, the tenant with the smallest goes first, and a tenant that becomes active is
lifted to the smallest of the active ones, so that being idle earns no credit.
"""

from __future__ import annotations

from collections import deque

from headrace.engine.sequence import Sequence

PROMPT_WEIGHT = 1
COMPLETION_WEIGHT = 2
"""A completion token costs about twice a prompt token; the paper's weights."""


class Tenant:
    """A tenant with sequences in the engine."""

    __slots__ = ("counter", "decoding", "number", "prefilling", "waiting")

    def __init__(self, number: int, counter: float) -> None:
        self.number = number
        self.counter = counter
        self.waiting: deque[Sequence] = deque()
        """The highest rank first, and within one in order of arrival; preempted ones come back to the front."""
        self.prefilling: list[Sequence] = []
        self.decoding = 0

    def queue(self, sequence: Sequence) -> None:
        """Let a new sequence wait, behind all that aren't of a lower rank."""
        waiting, rank = self.waiting, sequence.job.request.rank
        place = len(waiting)
        while place and waiting[place - 1].job.request.rank < rank:
            place -= 1
        waiting.insert(place, sequence)

    @property
    def urgency(self) -> int:
        """The highest rank that is to be computed or waits."""
        first = self.waiting[0].job.request.rank if self.waiting else 0
        return max([first, *(sequence.job.request.rank for sequence in self.prefilling)])

    @property
    def next_prompt(self) -> int:
        """Tokens that are left of the prompt whose turn comes first; 0 where there is none."""
        following = self.prefilling or self.waiting
        return following[0].length - following[0].computed if following else 0

    @property
    def running(self) -> int:
        return len(self.prefilling) + self.decoding

    @property
    def rank(self) -> tuple[float, int]:
        """Smallest goes first; of equals the one with less in the batch."""
        return self.counter, self.running


class Tenants:
    """The active tenants, and the counters of those that were served more than the active ones were."""

    def __init__(self) -> None:
        self._active: dict[int, Tenant] = {}
        self._left: dict[int, float] = {}
        self._floor = 0.0
        """Smallest counter of the active tenants when it was last looked at; it never falls."""

    def __len__(self) -> int:
        return len(self._active)

    def active(self) -> list[Tenant]:
        return list(self._active.values())

    def __getitem__(self, number: int) -> Tenant:
        return self._active[number]

    def enter(self, number: int) -> Tenant:
        """The tenant, active from now on."""
        tenant = self._active.get(number)
        if tenant is None:
            if self._active:
                self._floor = max(self._floor, min(other.counter for other in self._active.values()))
            tenant = Tenant(number, max(self._left.pop(number, 0.0), self._floor))
            self._active[number] = tenant
        return tenant

    def leave_if_idle(self, number: int) -> None:
        """Forget a tenant with nothing in the engine, but for a counter that it must answer for when it comes back."""
        tenant = self._active.get(number)
        if tenant is None or tenant.waiting or tenant.running:
            return
        del self._active[number]
        if not self._active:
            # Nobody is left to compare with: whoever comes next begins level with the last to leave.
            self._floor = max(self._floor, tenant.counter)
        if tenant.counter > self._floor:
            self._left[number] = tenant.counter
        if len(self._left) > 1024:
            self._left = {other: counter for other, counter in self._left.items() if counter > self._floor}
