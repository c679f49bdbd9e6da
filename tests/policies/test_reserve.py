"""What a caller's limits do to a call on its journey."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from headrace.call import Call
from headrace.claims import Ask, Claim, Reply, Settle, Take, Taken
from headrace.errors import EngineDied, HeadraceError, RateLimited
from headrace.journey import Journey
from headrace.policies import reserve
from headrace.policies.claimants import Claimants, network_of
from headrace.policies.rate_answers import duration
from headrace.policies.reserve import Reserve
from headrace.records import KeyRecord, LimitSpec, TenantRecord
from headrace.served import ServedModel, ServedModels
from headrace.stores.limit_table import LimitTable
from headrace.stores.shared_limits import SharedLimits
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, ModelFiles, Report, Sampling

pytestmark = pytest.mark.anyio


def shown(call: Call) -> dict[str, str]:
    assert call.late_headers is not None
    return call.late_headers()


class TableLimits:
    def __init__(self) -> None:
        self.table = LimitTable()

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        await asyncio.sleep(0)
        return [self.table.answer(ask) for ask in asks]

    async def reconnect(self) -> None: ...

    async def close(self) -> None: ...


class SteppingEngine:
    """A token for each choice and step, as many as it is asked for or `says`; it is `behind` steps ahead of its reader."""

    def __init__(self, says: int = 10**6, fails_at: int | None = None) -> None:
        self.says = says
        self.fails_at = fails_at
        self.made = 0
        self.asked: list[GenerateRequest] = []

    async def start(self) -> EngineCard:
        return EngineCard(model="m", kind="echo", context_length=10**6, vocab_size=8, fingerprint="")

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Event]]:
        self.asked.append(request)
        n, most = request.sampling.n, request.sampling.max_tokens
        for index in range(min(most, self.says)):
            await asyncio.sleep(0)
            if index == self.fails_at:
                raise EngineDied("gone")
            last = index + 1 == min(most, self.says)
            self.made += n
            yield [Delta(c, index, (1,), "x", ("length" if most <= self.says else "stop") if last else None) for c in range(n)]
        yield [Report(len(request.prompt), 0, n * min(most, self.says), 0, 0, 0)]

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...


class Prepared:
    """Makes the request, as `prepare` does."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, call: Call) -> Any:
        call.served_model = "m"
        call.request = GenerateRequest(id=call.id, prompt=[1] * self.prompt, sampling=call.sampling)
        call.outcome.prompt_tokens = self.prompt
        from contextlib import nullcontext

        return nullcontext()


class Stand:
    def __init__(self, engine: SteppingEngine, *, prompt: int = 10, anonymous: str = "none") -> None:
        self.engine = engine
        self.place = TableLimits()
        self.limits = SharedLimits(self.place)
        claimants = Claimants(anonymous, beyond_loopback=True)
        models = ServedModels([ServedModel(ModelFiles(name="m", kind="echo"), engine)])
        self.journey = Journey([Prepared(prompt), Reserve(claimants, self.limits)], models)
        self.number = 0

    def call(self, limits: LimitSpec | None = None, tenant: LimitSpec | None = None, **sampling: Any) -> Call:
        self.number += 1
        call = Call(
            id=f"r{self.number}", route="/", model=None, sampling=Sampling(**{"max_tokens": 100_000, **sampling}), address="10.1.2.3"
        )
        if limits is not None:
            call.caller = KeyRecord(id="key_a", name="a", prefix="", digest=b"", tenant="t", limits=limits)
            call.caller_tenant = TenantRecord(name="t", limits=tenant or LimitSpec())
        return call

    async def run(self, call: Call, *, leave_after: int | None = None) -> list[Event]:
        events: list[Event] = []
        async with aclosing(self.journey.run(call)) as batches:
            async for batch in batches:
                events += batch
                if leave_after is not None and call.outcome.completion_tokens >= leave_after:
                    break
        return events

    async def room(self, limits: LimitSpec) -> Any:
        """How the key stands."""
        from headrace.claims import claim_of

        probe = await self.limits.take(Take("probe", (claim_of("key:key_a", limits),), 0, 0, 0, 0))
        assert isinstance(probe, Taken)
        await self.limits.settle("probe", 0)
        return probe.rooms[0]


BUDGET = LimitSpec(budget_tokens=1000, budget_period="total")


async def test_a_lone_request_gets_its_budget_to_the_last_token_and_is_told_why_it_ends() -> None:
    stand = Stand(SteppingEngine())
    call = stand.call(BUDGET)
    events = await stand.run(call)
    assert call.outcome.completion_tokens == 990
    assert stand.engine.made == 990
    assert call.outcome.finish == "length"
    assert isinstance(events[-1], Report)
    assert call.notes["X-Headrace-Limit"] == "budget"
    assert not call.storable
    room = await stand.room(BUDGET)
    assert (room.spent, room.held) == (1000, 0)
    with pytest.raises(RateLimited) as refused:
        await stand.run(stand.call(BUDGET))
    assert refused.value.retry_after == 3600


@pytest.mark.parametrize("n", [1, 3])
async def test_many_requests_on_one_budget_never_pass_it(n: int) -> None:
    stand = Stand(SteppingEngine())
    calls = [stand.call(BUDGET, n=n) for _ in range(7)]
    await asyncio.gather(*(stand.run(call) for call in calls), return_exceptions=True)
    admitted = [call for call in calls if call.outcome.completion_tokens]
    assert len(admitted) > 1
    produced = 10 * len(admitted) + stand.engine.made
    assert 1000 - 4 * 7 * n <= produced <= 1000
    assert all(call.outcome.finish == "length" for call in admitted)
    room = await stand.room(BUDGET)
    assert produced <= room.spent <= 1000
    assert room.held == 0


async def test_what_was_leased_and_not_used_comes_back() -> None:
    stand = Stand(SteppingEngine(says=7))
    for _ in range(58):  # 17 each; a lease is 64
        await stand.run(stand.call(BUDGET))
    assert (await stand.room(BUDGET)).spent == 58 * 17


async def test_a_generous_maximum_refuses_nobody_whom_real_use_would_not() -> None:
    stand = Stand(SteppingEngine(says=7))
    limits = LimitSpec(budget_tokens=170, budget_period="total")
    # Ten of them fit by what they use, and only two by what they lease.
    await asyncio.gather(*(stand.run(stand.call(limits)) for _ in range(10)))
    assert (await stand.room(limits)).spent == 170


async def test_the_rate_of_tokens_admits_by_the_prompt_and_goes_below_nothing() -> None:
    stand = Stand(SteppingEngine(says=300))
    limits = LimitSpec(tpm=100)
    call = stand.call(limits)
    await stand.run(call)
    assert call.outcome.completion_tokens == 300
    assert shown(call)["x-ratelimit-limit-tokens"] == "100"
    assert shown(call)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as refused:
        await stand.run(stand.call(limits))
    # 210 below nothing, and 11 are needed: 221 tokens at 100 a minute.
    assert refused.value.retry_after == pytest.approx(221 * 0.6, abs=1)


async def test_a_prompt_beyond_the_rate_is_told_so() -> None:
    stand = Stand(SteppingEngine(), prompt=101)
    with pytest.raises(RateLimited, match="this prompt alone has 101"):
        await stand.run(stand.call(LimitSpec(tpm=100)))


async def test_who_hangs_up_pays_for_what_was_made_until_then() -> None:
    stand = Stand(SteppingEngine())
    await stand.run(stand.call(BUDGET), leave_after=100)
    room = await stand.room(BUDGET)
    assert 110 <= room.spent <= 112
    assert room.held == 0
    for _ in range(2):
        stand.limits.correct("r1", 111)  # the ledger knows, a moment later
    assert (await stand.room(BUDGET)).spent == 111


async def test_a_request_that_the_engine_never_began_costs_no_tokens() -> None:
    stand = Stand(SteppingEngine(fails_at=0))
    with pytest.raises(HeadraceError):
        await stand.run(stand.call(BUDGET))
    room = await stand.room(BUDGET)
    assert (room.spent, room.held, room.running) == (0, 0, 0)


async def test_an_engine_that_dies_leaves_what_it_made_on_the_bill() -> None:
    stand = Stand(SteppingEngine(fails_at=5))
    with pytest.raises(HeadraceError):
        await stand.run(stand.call(BUDGET))
    assert 15 <= (await stand.room(BUDGET)).spent <= 17


async def test_concurrency_is_free_again_when_a_request_is_over() -> None:
    stand = Stand(SteppingEngine(says=3))
    limits = LimitSpec(concurrency=1)
    for _ in range(3):
        await stand.run(stand.call(limits))
    running = stand.journey.run(stand.call(limits))
    await anext(running)
    with pytest.raises(RateLimited) as refused:
        await stand.run(stand.call(limits))
    assert refused.value.retry_after == 1
    await running.aclose()
    await stand.run(stand.call(limits))


class SlowToSettle(TableLimits):
    def __init__(self) -> None:
        super().__init__()
        self.may_settle = asyncio.Event()

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        if any(isinstance(ask, Settle) for ask in asks):
            await self.may_settle.wait()
        return await super().exchange(asks)


@pytest.mark.parametrize(
    ("begun", "most", "waits"), [(True, 10, False), (True, None, False), (True, 2, True), (False, 10, True), (False, None, True)]
)
async def test_an_answer_that_has_begun_waits_for_its_settlement_only_where_the_next_might_be_refused(
    begun: bool, most: int | None, waits: bool
) -> None:
    stand = Stand(SteppingEngine(says=3))
    place = stand.limits._place = SlowToSettle()
    limits = LimitSpec(concurrency=most, rpm=100)
    call = stand.call(limits)
    call.headers_sent = begun
    running = asyncio.create_task(stand.run(call))
    if waits:
        assert not (await asyncio.wait([running], timeout=0.05))[0]
    else:
        await running
    place.may_settle.set()
    await running
    assert (await stand.room(limits)).running == 0


async def test_the_tenant_limits_all_its_keys() -> None:
    stand = Stand(SteppingEngine(says=1))
    for _ in range(2):
        await stand.run(stand.call(LimitSpec(rpm=100), LimitSpec(rpm=2)))
    call = stand.call(LimitSpec(rpm=100), LimitSpec(rpm=2))
    with pytest.raises(RateLimited, match="tenant"):
        await stand.run(call)
    assert shown(call)["x-ratelimit-limit-requests"] == "2"
    assert shown(call)["x-ratelimit-remaining-requests"] == "0"


async def test_an_address_has_a_bucket_of_its_own() -> None:
    stand = Stand(SteppingEngine(says=1), anonymous="2/minute")
    for _ in range(2):
        await stand.run(stand.call())
    with pytest.raises(RateLimited) as refused:
        await stand.run(stand.call())
    assert refused.value.retry_after == pytest.approx(30, abs=1)
    other = stand.call()
    other.address = "10.1.2.4"
    await stand.run(other)


async def test_callers_without_limits_ask_nobody() -> None:
    stand = Stand(SteppingEngine(says=1))
    call = stand.call(LimitSpec())
    await stand.run(call)
    assert call.headers == {}
    assert call.transforms == []


async def test_waiting_for_unused_leases_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "PATIENCE", 0.2)
    stand = Stand(SteppingEngine())
    limits = LimitSpec(budget_tokens=80, budget_period="total")
    running = stand.journey.run(stand.call(limits))
    await anext(running)
    with pytest.raises(RateLimited) as refused:
        await stand.run(stand.call(limits))
    assert refused.value.retry_after == 1
    await running.aclose()
    await stand.run(stand.call(limits))


def test_one_household_is_one_caller() -> None:
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2:ffff::1") == "2001:db8:1:2::/64"
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") == "10.0.0.1"
    assert network_of("") == ""


def test_the_anonymous_limit_has_its_default_beyond_loopback() -> None:
    call = Call(id="r", route="/", model=None, sampling=Sampling(max_tokens=1), address="10.0.0.1")
    assert Claimants(None, beyond_loopback=False).claims(call) == ()
    assert Claimants("none", beyond_loopback=True).claims(call) == ()
    assert Claimants(None, beyond_loopback=True).claims(call) == (Claim("address:10.0.0.1", requests=10, window=60.0),)
    assert Claimants("5/hour", beyond_loopback=False).claims(call) == (Claim("address:10.0.0.1", requests=5, window=3600.0),)


def test_durations_are_openais() -> None:
    assert [duration(seconds) for seconds in (0, 0.0115, 1.5, 59.93, 360, 86399.2)] == ["0ms", "12ms", "1.5s", "60s", "6m0s", "24h0m0s"]
