"""Redis goes away, stalls and comes back: limits go on, nobody waits, and the counters are right afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from headrace.claims import Claim, Refused, Room, Settle, Take, Taken
from headrace.stores.limits_owed import OWED, OwedByTheDead, OwedFile, read_owed
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import SharedLimits
from real_servers import RedisServer

pytestmark = [pytest.mark.anyio, pytest.mark.alone]

LONG = 1e9


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer() as started:
        yield started


@pytest.fixture
async def limits(server: RedisServer) -> AsyncIterator[SharedLimits]:
    made = SharedLimits(RedisLimits(server.url), processes=2)
    # The first exchange connects, for which there is more time than for the others.
    await made.take(Take(name(), (Claim(name(), concurrency=1),), 0, 0, 0))
    yield made
    server.resume()
    with contextlib.suppress(AssertionError):
        if server._process is None:
            server.start()
    await made.close()


def name() -> str:
    return f"key:{uuid.uuid4().hex}"


async def back(limits: SharedLimits) -> None:
    for _ in range(1000):
        if not limits.away:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the limits never came back")


async def admitted(limits: SharedLimits, claim: Claim, times: int, *, prompt: int = 0, output: int = 0) -> list[str]:
    ids = [name() for _ in range(times)]
    replies = await asyncio.gather(*(limits.take(Take(id, (claim,), prompt, output, min(1, output))) for id in ids))
    return [id for id, reply in zip(ids, replies, strict=True) if isinstance(reply, Taken)]


@pytest.mark.parametrize("fault", ["kill", "pause"])
async def test_limits_go_on_from_a_share_and_count_right_afterwards(server: RedisServer, limits: SharedLimits, fault: str) -> None:
    claim = Claim(name(), requests=40, tokens=10_000, budget=10_000, period="total", window=LONG)
    before = await admitted(limits, claim, 10, prompt=10, output=20)
    assert len(before) == 10
    if fault == "kill":
        server.stop()  # it keeps what it has
    else:
        server.pause()
    begun = time.monotonic()
    away = await admitted(limits, claim, 200, prompt=10, output=20)
    assert time.monotonic() - begun < 1.0
    # Of the thirty that are left this process has half.
    assert len(away) == 15
    for id in (*before, *away):
        await asyncio.wait_for(limits.settle(id, 15), 0.2)
    if fault == "kill":
        server.start()
    else:
        server.resume()
    await back(limits)
    reply = await limits.take(Take(name(), (claim,), 0, 0, 0))
    assert isinstance(reply, Taken)
    room = reply.rooms[0]
    assert (room.spent, room.held, room.running) == (25 * 15, 0, 1)
    # A stalled server has meanwhile done what it was asked when it stalled; those requests were refused here, so they don't count.
    assert room.requests == pytest.approx(40 - 25 - 1, abs=0.01)
    assert room.tokens == pytest.approx(10_000 - 25 * 15, abs=1)


async def test_nobody_waits_for_a_stalled_server(server: RedisServer, limits: SharedLimits) -> None:
    claim = Claim(name(), requests=10_000, window=LONG)
    server.pause()
    waits = []
    for _ in range(50):
        begun = time.monotonic()
        await limits.take(Take(name(), (claim,), 0, 0, 0))
        waits.append(time.monotonic() - begun)
    assert max(waits) < 0.3
    assert sorted(waits)[45] < 0.02, "after the first the breaker is open"
    server.resume()
    await back(limits)


async def test_over_admission_stays_within_a_bucket_a_process(server: RedisServer) -> None:
    """Two processes of one server that both know nothing of the key."""
    claim = Claim(name(), requests=20, window=LONG)
    one, two = (SharedLimits(RedisLimits(server.url), processes=2) for _ in range(2))
    server.stop()
    try:
        counts = [len(await admitted(each, claim, 100)) for each in (one, two)]
        assert counts == [10, 10]
    finally:
        server.start()
    await back(one)
    await back(two)
    assert len(await admitted(one, claim, 100)) == 20  # they have not been settled, so the server doesn't know of them yet
    await one.close()
    await two.close()


async def test_a_request_under_way_gets_further_leases_while_the_server_is_away(server: RedisServer, limits: SharedLimits) -> None:
    claim = Claim(name(), tokens=1000, budget=500, period="total", window=LONG)
    (id,) = await admitted(limits, claim, 1, prompt=10, output=64)
    server.stop()
    told: asyncio.Queue[int] = asyncio.Queue()
    for _ in range(10):
        limits.extend(id, 64, lambda extended: told.put_nowait(extended.granted))
    granted = [await asyncio.wait_for(told.get(), 1) for _ in range(10)]
    assert granted[0] == 64
    assert sum(granted) == (500 - 74) // 2, "the share of what is left of the budget, and not a token more"
    await limits.settle(id, 200)
    server.start()
    await back(limits)
    reply = await limits.take(Take(name(), (claim,), 0, 0, 0))
    assert isinstance(reply, Taken)
    assert (reply.rooms[0].spent, reply.rooms[0].held) == (200, 0)


async def test_a_server_that_lost_everything_asks_the_ledger(server: RedisServer) -> None:
    claim = Claim(name(), budget=100, period="month", window=LONG)

    async def spent(asked: Claim, since: float) -> int:
        return 95

    limits = SharedLimits(RedisLimits(server.url), spent=spent)
    assert len(await admitted(limits, claim, 1, prompt=1, output=1)) == 1
    server.kill()
    server.start()
    with contextlib.suppress(AssertionError):
        await admitted(limits, claim, 1)
    await back(limits)
    assert isinstance(await limits.take(Take(name(), (claim,), 6, 1, 1)), Refused)
    await limits.close()


@pytest.mark.parametrize("older_state", [False, True])
async def test_a_redis_that_has_forgotten_reads_budgets_anew_and_charges_what_ran(server: RedisServer, older_state: bool) -> None:
    """`older_state`: it comes back with what it once saved; otherwise with nothing."""
    claim = Claim(name(), concurrency=2, budget=10_000, period="total")
    ledger = 0

    async def spent(claim: Claim, since: float) -> int:
        return ledger

    one, two = (SharedLimits(RedisLimits(server.url), spent=spent, processes=2) for _ in range(2))
    try:
        (saved,) = await admitted(one, claim, 1, prompt=10, output=20)
        server.stop()
        if not older_state:
            (server.folder / "dump.rdb").unlink()
        server.start()
        (first,) = await admitted(two, claim, 1, prompt=10, output=20)
        await one.settle(saved, 100)
        await back(one)
        await two.settle(first, 200)
        (running,) = await admitted(two, claim, 1, prompt=10, output=20)
        ledger = 300
        await asyncio.sleep(0.6)  # bills of requests that ended earlier are in the ledger for sure
        server.kill()
        server.start()
        told = asyncio.get_running_loop().create_future()
        two.extend(running, 50, told.set_result)
        await told  # it fails, which is how the loss of the connection is known
        await back(two)
        two.extend(running, 50, (granted := asyncio.get_running_loop().create_future()).set_result)
        assert (await granted).granted == 50
        for each in (two, one):
            await back(each)
            (id,) = await admitted(each, claim, 1)
            await each.settle(id, 0)
        # The ledger's, and nothing is left of leases in what came back.
        await asyncio.sleep(0.6)
        rooms = await _standing(one, claim)
        assert (rooms.spent, rooms.held, rooms.running) == (300, 0, 1)
        await two.settle(running, 70)
        await two.settle(running, 70)
        rooms = await _standing(one, claim)
        assert (rooms.spent, rooms.held, rooms.running) == (370, 0, 1)
    finally:
        await one.close()
        await two.close()


async def _standing(limits: SharedLimits, claim: Claim) -> Room:
    id = name()
    reply = await limits.take(Take(id, (claim,), 0, 0, 0))
    assert isinstance(reply, Taken)
    await limits.settle(id, 0)
    return reply.rooms[0]


async def test_what_a_process_had_to_tell_survives_its_death(server: RedisServer, tmp_path: Path) -> None:
    claim = Claim(name(), requests=1000, budget=10_000, period="total", window=LONG)
    file = tmp_path / OWED
    limits = SharedLimits(RedisLimits(server.url), kept=OwedFile(file))
    (leased,) = await admitted(limits, claim, 1, prompt=10, output=64)
    server.stop()
    (apart,) = await admitted(limits, claim, 1, prompt=10, output=64)
    await limits.settle(leased, 30, guessed=True)
    await limits.settle(apart, 20)
    limits.correct(leased, 28)
    # It is killed here: nothing of it ever talks to Redis again.
    assert limits._return is not None
    limits._return.cancel()
    owed = OwedByTheDead(tmp_path / "dead")
    owed.add(read_owed(file))
    telling = asyncio.create_task(owed.run(lambda: server.url))
    server.start()
    other = SharedLimits(RedisLimits(server.url))
    try:
        for _ in range(1000):
            if not owed.files():
                break
            await asyncio.sleep(0.01)
        rooms = await _standing(other, claim)
        assert (rooms.spent, rooms.held, rooms.running) == (48, 0, 1)
        # Whoever doesn't know that it was told tells it again.
        owed.add(read_owed(file))
        await owed.tell(server.url)
        assert (await _standing(other, claim)).spent == 48
    finally:
        telling.cancel()
        await limits.close()
        await other.close()


async def test_what_was_told_is_owed_no_more(server: RedisServer, tmp_path: Path) -> None:
    claim = Claim(name(), budget=10_000, period="total")
    file = tmp_path / OWED
    limits = SharedLimits(RedisLimits(server.url), kept=OwedFile(file))
    (id,) = await admitted(limits, claim, 1, prompt=10, output=64)
    server.pause()
    await admitted(limits, claim, 1)
    await limits.settle(id, 30)
    assert [ask.id for ask in read_owed(file) if isinstance(ask, Settle)] == [id]
    with file.open("ab") as torn:
        torn.write(b'[3,"')
    assert len(read_owed(file)) == 1
    server.resume()
    await back(limits)
    assert not file.exists()
    await limits.close()


@pytest.mark.parametrize("asks_while_away", [False, True])
async def test_a_second_absence_goes_on_from_what_was_known_before_the_first(
    server: RedisServer, limits: SharedLimits, asks_while_away: bool
) -> None:
    claim = Claim(name(), budget=1000, period="total")
    (id,) = await admitted(limits, claim, 1, prompt=0, output=100)

    async def granted(tokens: int) -> int:
        limits.extend(id, tokens, (told := asyncio.get_running_loop().create_future()).set_result)
        return int((await told).granted)

    for absence in range(2):
        server.stop()
        await admitted(limits, Claim(name(), concurrency=1), 1)
        assert limits.away
        if asks_while_away or absence:
            # Half of what was left, over both absences.
            assert await granted(200) == 200
        if absence == 0:
            server.start()
            await back(limits)
    assert await granted(1000) == (50 if asks_while_away else 250)
    server.start()
    await back(limits)


async def test_what_redis_forgot_is_found_out_however_much_others_have_asked_since(server: RedisServer) -> None:
    claim = Claim(name(), budget=10_000, period="total")
    ledger = 0

    async def spent(claim: Claim, since: float) -> int:
        return ledger

    one, two, other = (SharedLimits(RedisLimits(server.url), spent=spent) for _ in range(3))
    try:
        (id,) = await admitted(one, claim, 1, prompt=10, output=20)
        server.stop()  # it keeps this state
        server.start()
        await admitted(one, Claim(name(), concurrency=1), 1)
        await back(one)
        await one.settle(id, 25)
        ledger = 25
        await asyncio.sleep(0.6)  # the bill is in the ledger for sure
        server.kill()  # and forgets the settlement
        server.start()
        for _ in range(20):
            await admitted(other, Claim(name(), concurrency=1), 1)
        assert (await _standing(two, claim)).held == 30
        await admitted(one, Claim(name(), concurrency=1), 1)
        await back(one)
        await admitted(one, Claim(name(), concurrency=1), 1)
        rooms = await _standing(two, claim)
        assert (rooms.spent, rooms.held) == (25, 0)
    finally:
        for each in (one, two, other):
            await each.close()
