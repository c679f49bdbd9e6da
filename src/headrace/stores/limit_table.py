"""Limits in memory: the buckets, counters and leases of every subject, changed by one ask at a time.

It runs in the supervisor for `memory://`, and in each process on its share of things while Redis is away. `limits.lua` is the same
for Redis; tests/stores/test_limits_contract.py holds both to one model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from headrace.claims import (
    CORRECTED,
    LAPSED_SECONDS,
    LEASE_SECONDS,
    RECENT,
    RECOVERED,
    Ask,
    Charge,
    Claim,
    Dimension,
    Extend,
    Extended,
    Gone,
    Refused,
    Renew,
    Reply,
    Room,
    Settle,
    Settled,
    Take,
    Taken,
    Unseeded,
    period_start,
)

SWEEP_AT = 10_000
"""Subjects, leases or notes of charges in memory before those that say nothing any more are looked for."""
MOST_GUESSES = 10_000
"""Settled with a guess that may still be corrected by who recovers a dead process's bills; far fewer are open at a time."""


@dataclass(slots=True)
class Bucket:
    """A token bucket: `level` as of `at`."""

    level: float
    at: float
    size: int
    window: float

    def fill(self, size: int, window: float, now: float) -> None:
        """Let in what has come since. A smaller size than before spills what is over it; a clock that went back adds nothing."""
        self.level = min(size, self.level + max(0.0, now - self.at) * size / window)
        self.at, self.size, self.window = now, size, window

    def full(self, now: float) -> bool:
        return self.level + (now - self.at) * self.size / self.window >= self.size


@dataclass(slots=True)
class Subject:
    requests: Bucket | None = None
    tokens: Bucket | None = None
    leases: dict[str, Lease] = field(default_factory=dict)
    held: int = 0
    """Tokens of its leases."""
    loose: int = 0
    """Of these, output, which may come back unused."""
    period: float | None = None
    """Start of the period (Unix time) that `spent` is about; None while that isn't known."""
    spent: int = 0


@dataclass(slots=True)
class Lease:
    owner: object
    claims: tuple[Claim, ...]
    subjects: tuple[Subject, ...]
    prompt: int
    output: int
    expires: float
    counted: bool
    """It counts as a running request."""
    writer: str = ""
    """Of its request's bill."""
    lapsed: tuple[float | None, ...] | None = None
    """After it has lapsed: the period in which each subject was charged for it."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What a request was settled with before anybody knew what it was."""

    used: int
    subjects: tuple[Subject, ...]
    periods: tuple[float | None, ...]


class LimitTable:
    """`clock` is monotonic and moves the buckets; `wall` is Unix time and says which day and month it is."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._wall = wall
        self._subjects: dict[str, Subject] = {}
        self._leases: dict[str, Lease] = {}
        self._lapsed: dict[str, Lease] = {}
        self._charged: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._guesses: dict[str, Guess] = {}
        self._sweep_at = SWEEP_AT
        self._lapse_at = 0.0

    def __contains__(self, lease: str) -> bool:
        return lease in self._leases or lease in self._lapsed

    def answer(self, ask: Ask, owner: object = None) -> Reply:
        """Do what is asked, on behalf of a process."""
        now = self._clock()
        if now >= self._lapse_at:
            self._lapse_at = now + 1.0
            self._lapse([id for id, lease in self._leases.items() if lease.expires <= now], now)
        if isinstance(ask, Take):
            return self._take(ask, owner, now)
        if isinstance(ask, Settle):
            return self._settle_told(ask, now)
        if isinstance(ask, Extend):
            return self._extend(ask, now)
        if isinstance(ask, Charge):
            return self._charge(ask, now)
        if isinstance(ask, Gone):
            return self._end_all(ask.owner, now)
        return self._renew(ask, now)

    def lapse(self, owner: object) -> None:
        """The process is gone, and its requests with it."""
        self._lapse([id for id, lease in self._leases.items() if lease.owner == owner], self._clock())

    def know(self, claim: Claim, room: Room) -> None:
        """Have a subject stand as another place said of it; what it holds here is kept."""
        now = self._clock()
        subject = self._subject(claim.subject)
        if claim.requests is not None:
            subject.requests = Bucket(room.requests, now, claim.requests, claim.window)
        if claim.tokens is not None:
            subject.tokens = Bucket(room.tokens, now, claim.tokens, claim.window)
        if claim.budget is not None:
            subject.period, subject.spent = period_start(claim.period, self._wall()), room.spent

    def _take(self, ask: Take, owner: object, now: float) -> Reply:
        before = self._leases.get(ask.id)
        if before is not None:
            return Taken(before.output, before.output, self._rooms(before.claims, before.subjects))
        if ask.owner in self._gone:
            return Settled()
        subjects = tuple(self._subject(claim.subject) for claim in ask.claims)
        unknown = self._seed(ask, subjects)
        if unknown is not None:
            return unknown
        granted, ceiling = ask.output, math.inf
        refusals: list[tuple[float, int, Dimension, float | None, bool]] = []
        need = ask.prompt + ask.least
        for which, (claim, subject) in enumerate(zip(ask.claims, subjects, strict=True)):
            _refill(claim, subject, now)
            if subject.requests is not None and claim.requests is not None and subject.requests.level < ask.requests:
                wait = (ask.requests - subject.requests.level) * claim.window / claim.requests if claim.requests >= ask.requests else None
                refusals.append((wait or math.inf, which, "requests", wait, False))
            if claim.concurrency is not None and ask.requests and len(subject.leases) >= claim.concurrency:
                refusals.append((0.0, which, "concurrency", None, False))
            if subject.tokens is not None and claim.tokens is not None:
                level = subject.tokens.level
                if level < need:
                    wait = (need - level) * claim.window / claim.tokens if claim.tokens >= need else None
                    refusals.append((wait or math.inf, which, "tokens", wait, level + subject.loose >= need))
                granted = min(granted, math.floor(level) - ask.prompt)
            if claim.budget is not None:
                free = claim.budget - subject.spent - subject.held
                if free < need:
                    refusals.append((math.inf, which, "budget", None, free + subject.loose >= need))
                granted = min(granted, free - ask.prompt)
                ceiling = min(ceiling, free - ask.prompt)
        if refusals:
            # A refusal that others may undo is told only if no other stands in the way; else the one that lasts longest.
            _, which, dimension, wait, passing = max(refusals, key=lambda one: (not one[4], one[0]))
            return Refused(which, dimension, wait, passing, self._rooms(ask.claims, subjects))
        granted = max(granted, 0)
        lease = Lease(owner, ask.claims, subjects, ask.prompt, granted, now + LEASE_SECONDS, ask.requests > 0, ask.owner)
        self._leases[ask.id] = lease
        for subject in subjects:
            if subject.requests is not None:
                subject.requests.level -= ask.requests
            if subject.tokens is not None:
                subject.tokens.level -= ask.prompt + granted
            if lease.counted:
                subject.leases[ask.id] = lease
            subject.held += ask.prompt + granted
            subject.loose += granted
        if len(self._subjects) > self._sweep_at:
            self._sweep(now)
        return Taken(granted, None if ceiling == math.inf else int(ceiling), self._rooms(ask.claims, subjects))

    def _seed(self, ask: Take, subjects: tuple[Subject, ...]) -> Unseeded | None:
        """Have every budget known for the period it is now."""
        since: list[float | None] = [None] * len(subjects)
        wall = None
        for which, (claim, subject) in enumerate(zip(ask.claims, subjects, strict=True)):
            if claim.budget is None:
                continue
            wall = self._wall() if wall is None else wall
            start = period_start(claim.period, wall)
            if subject.period is not None and subject.period < start:
                subject.period, subject.spent = start, 0
            if subject.period == start:
                continue
            seed = ask.seeds[which] if which < len(ask.seeds) else None
            if seed is None:
                since[which] = start
            else:
                subject.period, subject.spent = start, seed
        return Unseeded(tuple(since)) if any(start is not None for start in since) else None

    def _extend(self, ask: Extend, now: float) -> Reply:
        lease = self._leases.get(ask.id)
        if lease is None:
            return Extended(0)
        granted, passing = ask.tokens, True
        for claim, subject in zip(lease.claims, lease.subjects, strict=True):
            if claim.budget is not None:
                free = claim.budget - subject.spent - subject.held
                if free < ask.tokens and free + subject.loose - lease.output < ask.tokens:
                    passing = False
                granted = min(granted, free)
        granted = max(0, granted)
        lease.output += granted
        lease.expires = now + LEASE_SECONDS
        for claim, subject in zip(lease.claims, lease.subjects, strict=True):
            _refill(claim, subject, now)
            if subject.tokens is not None:
                subject.tokens.level -= granted
            subject.held += granted
            subject.loose += granted
        return Extended(granted, passing and granted < ask.tokens)

    def _settle_told(self, ask: Settle, now: float) -> Settled:
        lease = self._leases.get(ask.id)
        if ask.life in (RECOVERED, RECENT):
            guess = self._guesses.pop(ask.id, None)
            if guess is not None:
                for period, subject in zip(guess.periods, guess.subjects, strict=True):
                    if period == subject.period:
                        subject.spent += ask.used - guess.used
            if guess is not None or lease is not None:
                # It is final: what the dead process said of it is of no account, should it come only now.
                self._charged[ask.id + CORRECTED] = now + LAPSED_SECONDS
        elif ask.guessed and lease is not None:
            self._guesses[ask.id] = Guess(ask.used, lease.subjects, tuple(subject.period for subject in lease.subjects))
            if len(self._guesses) > MOST_GUESSES:
                del self._guesses[next(iter(self._guesses))]
        return self._settle(ask.id, ask.used, now)

    def _settle(self, id: str, used: int, now: float) -> Settled:
        lease = self._leases.pop(id, None)
        if lease is None:
            return self._settle_lapsed(id, used)
        _end(id, lease, now, spent=used, back=lease.prompt + lease.output - used)
        return Settled(self._rooms(lease.claims, lease.subjects))

    def _settle_lapsed(self, id: str, used: int) -> Settled:
        lease = self._lapsed.pop(id, None)
        if lease is None or lease.lapsed is None:
            return Settled()
        for period, subject in zip(lease.lapsed, lease.subjects, strict=True):
            if period is not None and period == subject.period:
                subject.spent += used - lease.prompt - lease.output
        return Settled(self._rooms(lease.claims, lease.subjects))

    def _charge(self, ask: Charge, now: float) -> Settled:
        if ask.id in self._charged:
            return Settled()
        self._charged[ask.id] = now + LAPSED_SECONDS
        self._guesses.pop(ask.id.removesuffix(CORRECTED), None)
        if ask.id in self:
            if not ask.requests:
                self._uncount(ask.claims, now)
            return self._settle(ask.id, ask.used, now)
        subjects = tuple(self._subject(claim.subject) for claim in ask.claims)
        for claim, subject in zip(ask.claims, subjects, strict=True):
            _refill(claim, subject, now)
            if subject.requests is not None and claim.requests is not None:
                subject.requests.level = max(-claim.requests, subject.requests.level - ask.requests)
            if subject.tokens is not None and claim.tokens is not None:
                subject.tokens.level = max(-claim.tokens, subject.tokens.level - ask.used)
            subject.spent += ask.used
        return Settled(self._rooms(ask.claims, subjects))

    def _uncount(self, claims: tuple[Claim, ...], now: float) -> None:
        """A request that was admitted here was refused by who asked: the answer had been lost."""
        for claim in claims:
            subject = self._subject(claim.subject)
            _refill(claim, subject, now)
            if subject.requests is not None and claim.requests is not None:
                subject.requests.level = min(claim.requests, subject.requests.level + 1)

    def _renew(self, ask: Renew, now: float) -> Settled:
        for id in ask.ids:
            lease = self._leases.get(id)
            if lease is not None:
                lease.expires = now + LEASE_SECONDS
        return Settled()

    def _end_all(self, writer: str, now: float) -> Settled:
        """Of a process that is gone, and whose bills are all known: what it leased for requests without one was never used."""
        self._gone[writer] = now + LAPSED_SECONDS
        for leases in (self._leases, self._lapsed):
            for id in [id for id, lease in leases.items() if lease.writer == writer]:
                self._settle(id, 0, now)
        return Settled()

    def _lapse(self, ids: Iterable[str], now: float) -> None:
        """Give back the rates and the places of requests whose process is gone. Their budgets stay charged with all that was leased until
        somebody settles them: nothing may run past a budget."""
        for id in ids:
            lease = self._leases.pop(id)
            held = lease.prompt + lease.output
            _end(id, lease, now, spent=held, back=held)
            lease.lapsed = tuple(subject.period for subject in lease.subjects)
            lease.expires = now + LAPSED_SECONDS
            self._lapsed[id] = lease
        if self._lapsed or self._charged or self._gone:
            self._lapsed = {id: lease for id, lease in self._lapsed.items() if lease.expires > now}
            self._charged = {id: until for id, until in self._charged.items() if until > now}
            self._gone = {writer: until for writer, until in self._gone.items() if until > now}

    def _subject(self, name: str) -> Subject:
        subject = self._subjects.get(name)
        if subject is None:
            subject = self._subjects[name] = Subject()
        return subject

    def _rooms(self, claims: tuple[Claim, ...], subjects: tuple[Subject, ...]) -> tuple[Room, ...]:
        return tuple(
            Room(
                subject.requests.level if claim.requests is not None and subject.requests is not None else 0.0,
                subject.tokens.level if claim.tokens is not None and subject.tokens is not None else 0.0,
                subject.spent,
                subject.held,
                len(subject.leases),
            )
            for claim, subject in zip(claims, subjects, strict=True)
        )

    def _sweep(self, now: float) -> None:
        """Forget subjects that are as good as new: nothing held, no budget, and every bucket full by now."""
        forgotten = [name for name, subject in self._subjects.items() if _as_new(subject, now)]
        for name in forgotten:
            del self._subjects[name]
        self._sweep_at = max(SWEEP_AT, 2 * len(self._subjects))


def _end(id: str, lease: Lease, now: float, *, spent: int, back: int) -> None:
    """A lease holds nothing any more: `spent` is on its subjects' budgets, `back` (negative for what was used beyond it) in their rates."""
    for claim, subject in zip(lease.claims, lease.subjects, strict=True):
        subject.leases.pop(id, None)
        subject.held -= lease.prompt + lease.output
        subject.loose -= lease.output
        subject.spent += spent
        _refill(claim, subject, now)
        if subject.tokens is not None and claim.tokens is not None:
            subject.tokens.level = min(claim.tokens, subject.tokens.level + back)


def _refill(claim: Claim, subject: Subject, now: float) -> None:
    if claim.requests is None:
        subject.requests = None
    elif subject.requests is None:
        subject.requests = Bucket(claim.requests, now, claim.requests, claim.window)
    else:
        subject.requests.fill(claim.requests, claim.window, now)
    if claim.tokens is None:
        subject.tokens = None
    elif subject.tokens is None:
        subject.tokens = Bucket(claim.tokens, now, claim.tokens, claim.window)
    else:
        subject.tokens.fill(claim.tokens, claim.window, now)


def _as_new(subject: Subject, now: float) -> bool:
    if subject.leases or subject.held or subject.period is not None:
        return False
    return all(bucket is None or bucket.full(now) for bucket in (subject.requests, subject.tokens))
