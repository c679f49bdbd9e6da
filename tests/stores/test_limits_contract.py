"""One contract over the limits in memory and in Redis: both answer as a model that is too simple to be wrong."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.claims import (
    CORRECTED,
    RECOVERED,
    Ask,
    Charge,
    Claim,
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
)
from headrace.stores.limit_table import LimitTable
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import LimitPlace, SharedLimits

pytestmark = pytest.mark.anyio

LONG = 1e12
"""Seconds of a window in which nothing refills while a test runs."""


class TableLimits:
    """The table as a place."""

    def __init__(self) -> None:
        self.table = LimitTable()

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        await asyncio.sleep(0)
        return [self.table.answer(ask) for ask in asks]

    async def reconnect(self) -> None: ...

    async def close(self) -> None: ...


@pytest.fixture(params=["memory", "redis"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[LimitPlace]:
    made: LimitPlace = TableLimits() if request.param == "memory" else RedisLimits(request.getfixturevalue("redis_url"), timeout=5)
    yield made
    await made.close()


def unique(word: str = "key") -> str:
    return f"{word}:{uuid.uuid4().hex}"


async def one(place: LimitPlace, ask: Ask) -> Reply:
    return (await place.exchange([ask]))[0]


# The model


@dataclass
class Modelled:
    """What is left of each subject's limits, counted in the plainest way."""

    claims: dict[str, Claim]
    requests: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    spent: dict[str, int] = field(default_factory=dict)
    running: dict[str, tuple[Take, int]] = field(default_factory=dict)
    charged: set[str] = field(default_factory=set)

    def holders(self, subject: str) -> list[tuple[Take, int]]:
        return [(take, out) for take, out in self.running.values() if any(claim.subject == subject for claim in take.claims)]

    def held(self, subject: str) -> int:
        return sum(take.prompt + out for take, out in self.holders(subject))

    def tokens_left(self, claim: Claim) -> int:
        assert claim.tokens is not None
        return self.tokens.get(claim.subject, claim.tokens) - self.held(claim.subject)

    def free(self, claim: Claim) -> int:
        assert claim.budget is not None
        return claim.budget - self.spent.get(claim.subject, 0) - self.held(claim.subject)

    def blocks(self, take: Take) -> set[tuple[int, str]]:
        found = set()
        need = take.prompt + take.least
        for which, claim in enumerate(take.claims):
            if claim.requests is not None and self.requests.get(claim.subject, claim.requests) < 1:
                found.add((which, "requests"))
            if claim.concurrency is not None and len(self.holders(claim.subject)) >= claim.concurrency:
                found.add((which, "concurrency"))
            if claim.tokens is not None and self.tokens_left(claim) < need:
                found.add((which, "tokens"))
            if claim.budget is not None and self.free(claim) < need:
                found.add((which, "budget"))
        return found

    def granted(self, take: Take) -> int:
        most = [self.tokens_left(c) - take.prompt for c in take.claims if c.tokens is not None]
        most += [self.free(c) - take.prompt for c in take.claims if c.budget is not None]
        return min([take.output, *most])

    def take(self, take: Take) -> int:
        granted = self.granted(take)
        for claim in take.claims:
            if claim.requests is not None:
                self.requests[claim.subject] = self.requests.get(claim.subject, claim.requests) - 1
        self.running[take.id] = (take, granted)
        return granted

    def extend(self, id: str, tokens: int) -> int:
        if id not in self.running:
            return 0
        take, out = self.running[id]
        granted = max(0, min([tokens, *(self.free(c) for c in take.claims if c.budget is not None)]))
        self.running[id] = (take, out + granted)
        return granted

    def settle(self, id: str, used: int) -> bool:
        if id not in self.running:
            return False
        take, _ = self.running.pop(id)
        self._use(take.claims, used)
        return True

    def charge(self, id: str, claims: tuple[Claim, ...], requests: int, used: int) -> None:
        if id in self.charged:
            return
        self.charged.add(id)
        for claim in claims:
            if claim.requests is not None:
                left = self.requests.get(claim.subject, claim.requests) - requests
                self.requests[claim.subject] = max(-claim.requests, left)
            if claim.tokens is not None:
                held = self.held(claim.subject)
                left = self.tokens.get(claim.subject, claim.tokens) - held - used
                self.tokens[claim.subject] = max(-claim.tokens, left) + held
            self.spent[claim.subject] = self.spent.get(claim.subject, 0) + used

    def _use(self, claims: tuple[Claim, ...], used: int) -> None:
        for claim in claims:
            if claim.tokens is not None:
                self.tokens[claim.subject] = self.tokens.get(claim.subject, claim.tokens) - used
            self.spent[claim.subject] = self.spent.get(claim.subject, 0) + used


limits = st.none() | st.integers(1, 6)
amounts = st.none() | st.integers(1, 300)
shapes = st.tuples(limits, amounts, limits, amounts)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 2), st.integers(0, 60), st.integers(0, 80)),
        st.tuples(st.just("extend"), st.integers(0, 9), st.integers(1, 80)),
        st.tuples(st.just("settle"), st.integers(0, 9), st.integers(0, 120)),
        st.tuples(st.just("charge"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 50)),
    ),
    max_size=25,
)


class Run:
    def __init__(self, shape: list[tuple[int | None, ...]]) -> None:
        subjects = [unique() for _ in shape]
        self.all = [
            Claim(subject, requests, tokens, concurrency, budget, "total", LONG)
            for subject, (requests, tokens, concurrency, budget) in zip(subjects, shape, strict=True)
        ]
        self.model = Modelled({claim.subject: claim for claim in self.all})
        self.ids = [f"r{uuid.uuid4().hex}" for _ in range(10)]
        self.fresh = itertools.count()
        self.taken: list[str] = []

    def claims(self, which: int) -> tuple[Claim, ...]:
        """The first alone, the second alone, or both."""
        return (self.all[0],) if which == 0 else (self.all[1],) if which == 1 else (self.all[0], self.all[1])

    def ask(self, action: tuple[Any, ...]) -> Ask:
        kind, which, *numbers = action
        if kind == "take":
            id = f"{self.ids[0]}-{next(self.fresh)}"
            self.taken.append(id)
            claims = self.claims(which)
            return Take(id, claims, numbers[0], numbers[1], min(1, numbers[1]), 1, tuple(0 for _ in claims))
        id = self.taken[-1 - which % len(self.taken)] if self.taken else "unknown"
        if kind == "extend":
            return Extend(id, numbers[0])
        if kind == "settle":
            return Settle(id, numbers[0])
        return Charge(f"{self.ids[1]}-{which}", self.claims(which % 3), numbers[0], numbers[1])

    def check(self, ask: Ask, reply: Reply) -> None:
        if isinstance(ask, Take):
            blocks = self.model.blocks(ask)
            if blocks:
                assert isinstance(reply, Refused), (ask, blocks)
                assert (reply.which, reply.dimension) in blocks
                return
            assert isinstance(reply, Taken)
            assert reply.granted == self.model.granted(ask)
            budgets = [self.model.free(claim) - ask.prompt for claim in ask.claims if claim.budget is not None]
            assert reply.ceiling == (min(budgets) if budgets else None)
            self.model.take(ask)
            self.compare(ask.claims, reply.rooms)
        elif isinstance(ask, Extend):
            assert isinstance(reply, Extended)
            assert reply.granted == self.model.extend(ask.id, ask.tokens)
        elif isinstance(ask, Settle):
            assert isinstance(reply, Settled)
            assert (reply.rooms is not None) == self.model.settle(ask.id, ask.used)
        elif isinstance(ask, Charge):
            self.model.charge(ask.id, ask.claims, ask.requests, ask.used)

    def compare(self, claims: tuple[Claim, ...], rooms: tuple[Any, ...]) -> None:
        for claim, room in zip(claims, rooms, strict=True):
            subject = claim.subject
            if claim.requests is not None:
                assert room.requests == pytest.approx(self.model.requests[subject], abs=1e-3)
            if claim.tokens is not None:
                assert room.tokens == pytest.approx(self.model.tokens_left(claim), abs=1e-3)
            if claim.budget is not None:
                assert (room.spent, room.held) == (self.model.spent.get(subject, 0), self.model.held(subject))
            assert room.running == len(self.model.holders(subject))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=st.lists(shapes, min_size=2, max_size=2), plan=actions)
async def test_both_answer_as_the_model(place: LimitPlace, shape: list[tuple[int | None, ...]], plan: list[tuple[Any, ...]]) -> None:
    run = Run(shape)
    # Every budget is known from the start; that the ledger is asked is another test.
    known = unique()
    await place.exchange([Take(known, tuple(run.all), 0, 0, 0, 0, (0, 0)), Settle(known, 0)])
    for action in plan:
        ask = run.ask(action)
        run.check(ask, await one(place, ask))


# Single promises


async def test_200_at_once_admit_exactly_the_limit(place: LimitPlace) -> None:
    claim = Claim(unique(), requests=37, window=LONG)
    shared = SharedLimits(place)
    replies = await asyncio.gather(*(shared.take(Take(f"{claim.subject}{n}", (claim,), 5, 64, 1)) for n in range(200)))
    assert sum(isinstance(reply, Taken) for reply in replies) == 37


async def test_200_at_once_on_a_budget_never_pass_it(place: LimitPlace) -> None:
    key = Claim(unique(), budget=1000, period="total")
    tenant = Claim(unique("tenant"), budget=700, period="day")
    shared = SharedLimits(place)
    replies = await asyncio.gather(*(shared.take(Take(f"{key.subject}{n}", (key, tenant), 6, 8, 8)) for n in range(200)))
    assert sum(isinstance(reply, Taken) for reply in replies) == 50


async def test_what_refuses_one_claim_takes_nothing_of_the_other(place: LimitPlace) -> None:
    key = Claim(unique(), requests=5, tokens=100, window=LONG)
    tenant = Claim(unique("tenant"), requests=1, window=LONG)
    assert isinstance(await one(place, Take(unique(), (tenant,), 0, 0, 0)), Taken)
    refused = await one(place, Take(unique(), (key, tenant), 10, 10, 1))
    assert isinstance(refused, Refused)
    assert (refused.which, refused.dimension) == (1, "requests")
    assert refused.rooms[0].requests == pytest.approx(5)
    assert refused.rooms[0].tokens == pytest.approx(100)


async def test_what_comes_to_nothing_counts_whatever_is_left_and_takes_no_place(place: LimitPlace) -> None:
    claim = Claim(unique(), requests=9, concurrency=1, window=LONG)
    shared = SharedLimits(place)
    running, id = unique(), unique()
    assert isinstance(await shared.take(Take(running, (claim,), 5, 5, 1)), Taken)
    rooms = await shared.charge(id, (claim,), 5)
    assert rooms is not None
    assert rooms[0].requests == pytest.approx(3)
    assert rooms[0].running == 1
    assert await shared.charge(id, (claim,), 5) is None
    await shared.settle(running, 5)
    assert isinstance(await shared.take(Take(unique(), (claim,), 5, 5, 1)), Taken)
    rooms = await shared.charge(unique(), (claim,), 1000)
    assert rooms is not None
    assert rooms[0].requests == pytest.approx(-9)
    refused, _ = shared.peek((claim,))
    assert refused is not None
    assert refused.dimension == "requests"


@pytest.mark.parametrize("used", [90, 200])
async def test_what_comes_to_nothing_says_of_a_budget_what_the_ledger_says(used: int, place: LimitPlace) -> None:
    claim = Claim(unique(), requests=9, budget=100, period="total", window=LONG)

    async def spent(asked_of: Claim, since: float) -> int:
        return used

    shared = SharedLimits(place, spent=spent)
    for left in (8, 7):
        rooms = await shared.charge(unique(), (claim,), 1)
        assert rooms is not None
        assert rooms[0].requests == pytest.approx(left)
        assert (rooms[0].spent, rooms[0].held, rooms[0].running) == (used, 0, 0)


async def test_a_bucket_refills_with_time_and_says_when(place: LimitPlace) -> None:
    claim = Claim(unique(), requests=2, window=0.4)
    assert all(isinstance(reply, Taken) for reply in await place.exchange([Take(unique(), (claim,), 0, 0, 0) for _ in range(2)]))
    refused = await one(place, Take(unique(), (claim,), 0, 0, 0))
    assert isinstance(refused, Refused)
    assert refused.wait is not None
    assert 0 < refused.wait <= 0.2
    await asyncio.sleep(refused.wait + 0.005)
    assert isinstance(await one(place, Take(unique(), (claim,), 0, 0, 0)), Taken)


async def test_a_budget_that_is_not_known_is_asked_of_the_ledger_once(place: LimitPlace) -> None:
    claim = Claim(unique(), budget=100, period="day")
    asked = []

    async def spent(asked_of: Claim, since: float) -> int:
        asked.append((asked_of.subject, since % 86400))
        return 90

    shared = SharedLimits(place, spent=spent)
    taken = await shared.take(Take(unique(), (claim,), 4, 64, 1))
    assert isinstance(taken, Taken)
    assert (taken.granted, taken.ceiling) == (6, 6)
    refused = await shared.take(Take(unique(), (claim,), 4, 64, 1))
    assert isinstance(refused, Refused)
    assert refused.passing  # the six may come back unused
    assert asked == [(claim.subject, 0.0)]


async def test_a_month_begins_on_its_first_day(place: LimitPlace) -> None:
    claim = Claim(unique(), budget=100, period="month")
    reply = await one(place, Take(unique(), (claim,), 4, 64, 1))
    assert isinstance(reply, Unseeded)
    import datetime as dt

    now = dt.datetime.now(dt.UTC)
    assert reply.since == (dt.datetime(now.year, now.month, 1, tzinfo=dt.UTC).timestamp(),)


async def test_running_requests_of_the_tokens_rate_go_on_below_nothing(place: LimitPlace) -> None:
    claim = Claim(unique(), tokens=50, window=LONG)
    id = unique()
    await one(place, Take(id, (claim,), 10, 64, 1))
    assert await one(place, Extend(id, 64)) == Extended(64)
    settled = await one(place, Settle(id, 200))
    assert isinstance(settled, Settled)
    assert settled.rooms is not None
    assert settled.rooms[0].tokens == pytest.approx(-150)


async def test_a_charge_counts_once_and_settles_a_lease_of_its_name(place: LimitPlace) -> None:
    claim = Claim(unique(), requests=10, concurrency=1, budget=100, period="total", window=LONG)
    id = unique()
    await one(place, Take(id, (claim,), 10, 20, 1, 1, (0,)))
    for _ in range(2):
        await one(place, Charge(id, (claim,), 1, 15))
    taken = await one(place, Take(unique(), (claim,), 0, 1, 1))
    assert isinstance(taken, Taken)
    assert (taken.rooms[0].spent, taken.rooms[0].running) == (15, 1)
    assert taken.rooms[0].requests == pytest.approx(8)


async def test_a_lease_that_nobody_renews_gives_back_its_place_and_stays_on_the_budget_until_it_is_settled(
    place: LimitPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import headrace.stores.limit_table as table
    import headrace.stores.limits_redis as redis

    monkeypatch.setattr(table, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(redis, "LEASE_SECONDS", 0.3)
    claim = Claim(unique(), tokens=1000, concurrency=2, budget=500, period="total", window=LONG)
    gone, kept = unique(), unique()
    await one(place, Take(gone, (claim,), 10, 20, 1, 1, (0,)))
    await one(place, Take(kept, (claim,), 10, 20, 1, 1, (0,)))
    assert isinstance(await one(place, Take(unique(), (claim,), 1, 1, 1)), Refused)
    for _ in range(16):  # renewed for longer than a lease, and than the table waits between looks
        await asyncio.sleep(0.1)
        await one(place, Renew((kept,)))
    taken = await one(place, Take(unique(), (claim,), 1, 1, 1))
    assert isinstance(taken, Taken)
    assert taken.rooms[0].tokens == pytest.approx(1000 - 30 - 2)
    assert (taken.rooms[0].spent, taken.rooms[0].held, taken.rooms[0].running) == (30, 32, 2)
    await one(place, Settle(gone, 12))
    refused = await one(place, Take(unique(), (claim,), 1, 1, 1))
    assert isinstance(refused, Refused)
    assert refused.rooms[0].spent == 12


async def test_what_a_dead_process_began_without_a_bill_costs_nothing(place: LimitPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    import headrace.stores.limit_table as table
    import headrace.stores.limits_redis as redis

    claim = Claim(unique(), tokens=1000, concurrency=5, budget=500, period="total", window=LONG)
    dead, living = unique("writer"), unique("writer")

    def take(owner: str, id: str = "") -> Take:
        return Take(id or unique(), (claim,), 10, 20, 1, 1, (0,), owner)

    async def room() -> Room:
        taken = await one(place, Take(unique(), (claim,), 0, 0, 0, 0))
        assert isinstance(taken, Taken)
        return taken.rooms[0]

    with monkeypatch.context() as soon:
        soon.setattr(table, "LEASE_SECONDS", 0.05)
        soon.setattr(redis, "LEASE_SECONDS", 0.05)
        await one(place, take(dead))
        while (await room()).running:
            await asyncio.sleep(0.01)
    assert (await room()).spent == 30
    billed = unique()
    for ask in (take(dead), take(dead, billed), take(living)):
        assert isinstance(await one(place, ask), Taken)
    await one(place, Settle(billed, 12, (claim,), RECOVERED, time.time() + 1))
    for _ in range(2):
        await one(place, Gone(dead))
        # What it sent before its death may be read later.
        assert isinstance(await one(place, take(dead)), Settled)
        left = await room()
        assert (left.spent, left.held, left.running) == (12, 30, 1)
        assert left.tokens == pytest.approx(1000 - 12 - 30)


async def test_leases_bear_the_name_of_their_process(place: LimitPlace) -> None:
    claim = Claim(unique(), budget=500, period="total")
    writer = unique("writer")

    async def spent(claim: Claim, since: float) -> int:
        return 100

    shared = SharedLimits(place, spent=spent, owner=writer)
    assert isinstance(await shared.take(Take(unique(), (claim,), 10, 20, 1)), Taken)
    await one(place, Gone(writer))
    taken = await one(place, Take(unique(), (claim,), 0, 0, 0, 0))
    assert isinstance(taken, Taken)
    assert (taken.rooms[0].spent, taken.rooms[0].held) == (100, 0)
    await shared.close()


async def test_what_recovery_says_corrects_a_guess(place: LimitPlace) -> None:
    claim = Claim(unique(), budget=500, period="total")
    shared = SharedLimits(place)
    guessed, corrected = unique(), unique()
    for id in (guessed, corrected):
        await shared.take(Take(id, (claim,), 10, 20, 1))
        await shared.settle(id, 15, guessed=True)
    shared.correct(corrected, 12)
    # Behind it.
    assert isinstance(await shared.take(Take(unique(), (claim,), 0, 0, 0, 0)), Taken)
    for _ in range(2):
        for id in (guessed, corrected):
            await place.exchange([Settle(id, 12, (claim,), RECOVERED, time.time() + 1)])
    taken = await shared.take(Take(unique(), (claim,), 0, 0, 0))
    assert isinstance(taken, Taken)
    assert taken.rooms[0].spent == 24
    await shared.close()


async def test_a_cancelled_take_holds_nothing(place: LimitPlace) -> None:
    claim = Claim(unique(), concurrency=1)
    shared = SharedLimits(place)
    taking = asyncio.create_task(shared.take(Take(unique(), (claim,), 1, 1, 1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    taking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await taking
    assert isinstance(await shared.take(Take(unique(), (claim,), 1, 1, 1)), Taken)


async def test_peek_refuses_what_take_would(place: LimitPlace) -> None:
    claim = Claim(unique(), requests=1, window=LONG)
    shared = SharedLimits(place)
    assert shared.peek((claim,))[0] is None
    await shared.take(Take(unique(), (claim,), 1, 1, 1))
    refused, rooms = shared.peek((claim,))
    assert refused is not None
    assert refused.dimension == "requests"
    assert rooms[0].requests < 1


# Time, which only the table's can be set


def test_clocks_that_jump_neither_fill_nor_empty() -> None:
    now, wall = [1000.0], [1_700_000_000.0]
    table = LimitTable(lambda: now[0], lambda: wall[0])
    claim = Claim("key:a", requests=2, budget=100, period="day", window=60)
    take: Callable[[int], Take] = lambda n: Take(f"r{n}", (claim,), 10, 0, 0, 1, (0,))  # noqa: E731
    assert isinstance(table.answer(take(1)), Taken)
    wall[0] += 3600  # within the day: nothing changes
    now[0] -= 500  # a monotonic clock doesn't, but a bucket survives it
    taken = table.answer(take(2))
    assert isinstance(taken, Taken)
    assert taken.rooms[0].requests == pytest.approx(0)
    table.answer(Settle("r1", 10))
    table.answer(Settle("r2", 10))
    now[0] += 600
    wall[0] += 86400  # a new day: the budget is whole, without asking anybody
    fresh = table.answer(Take("r3", (claim,), 10, 0, 0))
    assert isinstance(fresh, Taken)
    assert fresh.rooms[0].spent == 0
    wall[0] -= 86400  # back: what this day had is asked of the ledger
    assert isinstance(table.answer(Take("r4", (claim,), 10, 0, 0)), Unseeded)


def test_addresses_that_come_once_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.stores.limit_table.SWEEP_AT", 50)
    now = [0.0]
    table = LimitTable(lambda: now[0])
    for number in range(2000):
        now[0] += 2.0
        table.answer(Take(f"r{number}", (Claim(f"address:{number}", requests=10),), 0, 0, 0))
        table.answer(Settle(f"r{number}", 0))
    assert len(table._subjects) <= 120


def test_what_a_dead_process_said_and_is_read_after_its_recovery_changes_nothing() -> None:
    table = LimitTable()
    claim = Claim("key:a", budget=500, period="total")
    for id in ("unread", "settled"):
        table.answer(Take(id, (claim,), 10, 20, 1, 1, (0,)), 100)
    table.answer(Settle("settled", 15, (claim,), guessed=True), 100)
    for id in ("unread", "settled"):
        table.answer(Settle(id, 12, (claim,), RECOVERED))
        table.answer(Settle(id, 15, (claim,), guessed=True), 100)
        table.answer(Charge(id + CORRECTED, (claim,), 0, -3), 100)
    taken = table.answer(Take("", (claim,), 0, 0, 0))
    assert isinstance(taken, Taken)
    assert taken.rooms[0].spent == 24


def test_the_supervisor_gives_back_what_a_dead_process_held() -> None:
    table = LimitTable()
    claim = Claim("key:a", concurrency=2)
    table.answer(Take("a", (claim,), 1, 1, 1), 100)
    table.answer(Take("b", (claim,), 1, 1, 1), 200)
    assert isinstance(table.answer(Take("c", (claim,), 1, 1, 1), 200), Refused)
    table.lapse(100)
    taken = table.answer(Take("c", (claim,), 1, 1, 1), 200)
    assert isinstance(taken, Taken)
    assert taken.rooms[0].running == 2
