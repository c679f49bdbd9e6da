"""What budgets begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.claims import Claim
from headrace.errors import StoreUnavailable
from headrace.stores.journal import Journal, files
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.limits_open import spent_by
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
