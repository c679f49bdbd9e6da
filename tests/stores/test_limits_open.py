"""What budgets begin with."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import uuid4

import pytest
from msgspec import structs

from headrace.claims import RECENT, Charge, Claim, Settle, Take, Taken
from headrace.errors import StoreUnavailable
from headrace.stores.journal import Journal, files
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.limits_open import settlement, spent_by
from headrace.stores.limits_owed import OwedByTheDead
from headrace.stores.limits_redis import RedisLimits
from headrace.types import UsageRow

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
