"""What budgets begin with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from msgspec import structs

from headrace.claims import RECENT, Ask, Charge, Claim, Renew, Reply, Settle, Settled, Take, Taken
from headrace.errors import StoreUnavailable
from headrace.records import UsageRow
from headrace.stores.journal import Journal, files
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.limit_table import LimitTable
from headrace.stores.limits_open import settlement, spent_by
from headrace.stores.limits_owed import OwedByTheDead
from headrace.stores.limits_redis import RedisLimits
from headrace.stores.shared_limits import SharedLimits

pytestmark = pytest.mark.anyio


async def test_a_budget_isnt_known_while_bills_wait_in_a_journal(tmp_path: Path) -> None:
    row = UsageRow(id="a", opened_at=5.0, tenant="acme", model="m", key="key_1", completion_tokens=7, settled_at=6.0, status="ok")
    ledger = MemoryLedger()
    spent = spent_by(ledger, tmp_path)
    claim = Claim("key:key_1", budget=100)
    assert await spent(claim, 0) == 0
    (tmp_path / "writer").mkdir()
    journal = Journal(tmp_path / "writer")
    journal.append([row])
    with pytest.raises(StoreUnavailable):
        await spent(claim, 0)
    await ledger.write([], [row])
    for path in journal.rotate():
        path.unlink()
    assert files(tmp_path / "writer") == []
    assert await spent(claim, 0) == 7


async def test_what_the_dead_used_is_charged_once_unless_they_had_settled_it(redis_url: str, tmp_path: Path) -> None:
    key = uuid4().hex
    claim = Claim(f"key:{key}", budget=1000, period="total")
    place = RedisLimits(redis_url, timeout=5)

    async def spent() -> int:
        (taken,) = await place.exchange([Take(uuid4().hex, (claim,), 0, 0, 0, 0, (0,))])
        assert isinstance(taken, Taken)
        return taken.rooms[0].spent

    def bill(id: str, tokens: int) -> UsageRow:
        row = UsageRow(id=id, opened_at=time.time(), tenant="acme", model="m", key=key, completion_tokens=tokens)
        return structs.replace(row, settled_at=time.time() + 1, status="interrupted")

    assert await spent() == 0
    leased, over, unknown = (uuid4().hex for _ in range(3))
    await place.exchange([Take(leased, (claim,), 10, 20, 1), Take(over, (claim,), 10, 20, 1), Settle(over, 15)])
    owed = OwedByTheDead(tmp_path / "owed")
    for _ in range(2):  # its answer may be lost
        owed.add([settlement(bill(leased, 12)), settlement(bill(over, 15)), settlement(bill(unknown, 100))])
        await owed.tell(redis_url)
        assert await spent() == 12 + 15 + 100
    assert owed.files() == []
    # A budget that was read from the ledger since then has it.
    owed.add([settlement(structs.replace(bill(uuid4().hex, 7), settled_at=time.time() - 60))])
    await owed.tell(redis_url)
    assert await spent() == 12 + 15 + 100
    # Of what may have been settled so long ago that Redis wouldn't know only leases that are still there tell anything.
    still, forgotten = uuid4().hex, uuid4().hex
    await place.exchange([Take(still, (claim,), 10, 20, 1)])
    owed.add([structs.replace(settlement(bill(id, 9)), life=RECENT, ended=time.time() - 300) for id in (still, forgotten)])
    await owed.tell(redis_url)
    assert await spent() == 12 + 15 + 100 + 9
    await place.close()


async def test_a_guess_that_nobody_lived_to_correct_is_corrected_once(redis_url: str, tmp_path: Path) -> None:
    key = uuid4().hex
    claim = Claim(f"key:{key}", budget=1000, period="total")
    place = RedisLimits(redis_url, timeout=5)
    leased, apart, corrected = (uuid4().hex for _ in range(3))
    await place.exchange([Take(leased, (claim,), 10, 20, 1, 1, (0,)), Settle(leased, 15), Charge(apart, (claim,), 1, 17)])
    await place.exchange([Take(corrected, (claim,), 10, 20, 1), Settle(corrected, 15), Charge(f"{corrected}:corrected", (claim,), 0, -2)])
    owed = OwedByTheDead(tmp_path / "owed")
    for _ in range(2):
        now = time.time() + 1
        row = UsageRow(id="", opened_at=now, tenant="acme", model="m", key=key, completion_tokens=13, settled_at=now, status="interrupted")
        owed.add(settlement(structs.replace(row, id=id)) for id in (leased, apart, corrected))
        await owed.tell(redis_url)
        (taken,) = await place.exchange([Take(uuid4().hex, (claim,), 0, 0, 0, 0)])
        assert isinstance(taken, Taken)
        assert taken.rooms[0].spent == 3 * 13
    await place.close()


class _Untold:
    """Can't be removed."""

    def add(self, ask: Ask) -> None: ...

    def clear(self) -> None:
        raise OSError("read-only file system")


class _Flaky(LimitTable):
    """A place that is away once."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = True

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        if self.fails:
            self.fails = False
            raise StoreUnavailable("away")
        return [self.answer(ask) for ask in asks]

    async def tell(self, asks: Sequence[Ask]) -> None:
        await self.exchange(asks)

    async def reconnect(self) -> None: ...

    async def close(self) -> None: ...


async def test_limits_are_shared_again_even_if_the_file_of_what_was_owed_stays() -> None:
    limits = SharedLimits(_Flaky(), kept=_Untold())
    claims = (Claim("key:a", budget=1000, period="total"),)
    await limits.take(Take("one", claims, 1, 1, 1, 1, (0,)))
    assert limits.away
    async with asyncio.timeout(20):
        while limits.away:
            await asyncio.sleep(0.01)
    assert isinstance(await limits.take(Take("two", claims, 1, 1, 1, 1, (0,))), Taken)
    for id in ("one", "two"):
        await limits.settle(id, 1)
    await limits.close()


async def test_redis_may_refuse_to_tell_of_itself() -> None:
    """`INFO` isn't for users without "dangerous" commands."""
    hung_up = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                parts = []
                for _ in range(int((await reader.readuntil())[1:])):
                    length = int((await reader.readuntil())[1:])
                    parts.append((await reader.readexactly(length + 2))[:-2])
                told = {b"INFO": b"-NOPERM this user has no permissions to run the 'info' command", b"EVALSHA": b"$14\r\n[1,[[5,null]]]"}
                writer.write(told.get(parts[0].upper(), b"+OK") + b"\r\n")
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        place = RedisLimits(f"redis://127.0.0.1:{port}?protocol=2", timeout=5)
        assert await place.exchange([Renew(())]) == [Settled()]
        await place.close()
        await hung_up.wait()
