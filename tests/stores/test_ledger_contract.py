"""What every ledger does, over all that there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.ports import Ledger
from headrace.records import UsageLine, UsageQuery, UsageRow
from headrace.stores.database import Database
from headrace.stores.ledger_memory import MemoryLedger
from headrace.stores.ledger_sql import SqlLedger

pytestmark = pytest.mark.anyio

NOON = 1_795_000_000.0 // 86400 * 86400 + 43200
DAY = 86400.0


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Ledger]:
    if request.param == "memory":
        yield MemoryLedger()
        return
    url = f"sqlite:///{tmp_path}/headrace.db" if request.param == "sqlite" else request.getfixturevalue("empty_postgres_url")
    database = Database(url)
    await database.migrate()
    yield SqlLedger(database)
    await database.close()


def opened(id: str, **more: Any) -> UsageRow:
    usual: dict[str, Any] = {"opened_at": NOON, "tenant": "acme", "model": "m", "key": "key_1", "writer": "w", "currency": "EUR"}
    return UsageRow(id=id, **usual | more)


def settled(row: UsageRow, completion: int, **more: Any) -> UsageRow:
    return msgspec.structs.replace(row, settled_at=row.opened_at + 1, status="ok", finish="stop", completion_tokens=completion, **more)


async def total(ledger: Ledger, **query: Any) -> UsageLine | None:
    lines = await ledger.usage(UsageQuery(**query))
    assert len(lines) <= 1
    return lines[0] if lines else None


async def test_a_row_is_open_until_it_is_settled(ledger: Ledger) -> None:
    row = opened("a", choices=3)
    await ledger.write([row], [])
    assert await ledger.open_rows("w") == [row]
    assert await ledger.open_rows("other") == []
    assert await total(ledger) is None
    await ledger.write([], [settled(row, 5, prompt_tokens=7, cached_tokens=2)])
    assert await ledger.open_rows("w") == []
    line = await total(ledger)
    assert line is not None
    assert (line.requests, line.prompt_tokens, line.cached_tokens, line.completion_tokens, line.price) == (1, 7, 2, 5, None)


async def test_a_row_is_settled_once_whatever_is_written_again(ledger: Ledger) -> None:
    row = opened("a")
    await ledger.write([row], [settled(row, 5)])
    await ledger.write([row], [settled(row, 9)])
    await ledger.write([row], [])
    line = await total(ledger)
    assert line is not None
    assert (line.requests, line.completion_tokens) == (1, 5)
    assert await ledger.open_rows("w") == []


async def test_a_settlement_may_come_before_its_opening(ledger: Ledger) -> None:
    row = opened("a")
    await ledger.write([], [settled(row, 4)])
    await ledger.write([row], [])
    line = await total(ledger)
    assert line is not None
    assert line.completion_tokens == 4
    assert await ledger.open_rows("w") == []


@pytest.mark.parametrize("count", [1, 3, 21, 85, 700])
async def test_groups_of_any_size(ledger: Ledger, count: int) -> None:
    rows = [opened(str(number), opened_at=NOON + number, choices=number) for number in range(count)]
    await ledger.write(rows, [])
    assert await ledger.open_rows("w") == rows
    # Once more among them, as a journal may have it: the first that comes counts.
    again = [settled(row, 1000) for row in rows[: count // 2]]
    await ledger.write(rows, [settled(row, number) for number, row in enumerate(rows)] + again)
    assert await ledger.open_rows("w") == []
    line = await total(ledger)
    assert line is not None
    assert (line.requests, line.completion_tokens) == (count, sum(range(count)))


async def test_writers_at_once(ledger: Ledger) -> None:
    rows = [opened(f"r{number}") for number in range(200)]
    groups = [rows[at : at + 50] for at in range(0, 200, 25)]  # each row is in two of them
    await asyncio.gather(*(ledger.write(group, [settled(row, 1) for row in group]) for group in groups))
    line = await total(ledger)
    assert line is not None
    assert (line.requests, line.completion_tokens) == (200, 200)


async def test_groups_filters_and_days(ledger: Ledger) -> None:
    rows = [
        settled(opened("1"), 1, prompt_tokens=10),
        settled(opened("2", key="key_2"), 2, prompt_tokens=20),
        settled(opened("3", key="", tenant="anonymous", model="n"), 4, prompt_tokens=40),
        settled(opened("4", opened_at=NOON + DAY, model="n"), 8, prompt_tokens=80),
        settled(opened("5", opened_at=NOON - 43200), 16, prompt_tokens=160),
        settled(opened("6", opened_at=NOON - 43200.001), 32, prompt_tokens=320),
    ]
    await ledger.write(rows, rows)

    async def by(*groups: Any, **query: Any) -> dict[tuple[str, ...], int]:
        lines = await ledger.usage(UsageQuery(group_by=groups, **query))
        return {tuple(line.group[name] for name in groups): line.completion_tokens for line in lines}

    assert await by("tenant") == {("acme",): 59, ("anonymous",): 4}
    assert await by("key", "model") == {("", "n"): 4, ("key_1", "m"): 49, ("key_1", "n"): 8, ("key_2", "m"): 2}
    assert list((await by("day")).values()) == [32, 1 + 2 + 4 + 16, 8]
    assert [len(day) for (day,) in await by("day")] == [10, 10, 10]
    assert await by(tenant="acme", model="m", key="key_2") == {(): 2}
    assert await by(since=NOON, until=NOON + DAY) == {(): 7}
    assert await by(since=NOON + 2 * DAY) == {}
    assert await ledger.used("tenant", "acme", NOON - DAY) == 59 + 590
    assert await ledger.used("key", "key_1", NOON) == 9 + 90
    assert await ledger.used("key", "nobody", 0) == 0


async def test_money_is_added_up_exactly_and_never_across_currencies(ledger: Ledger) -> None:
    rows = [
        settled(opened("1"), 1, price=1),
        settled(opened("2"), 1, price=999_999_999_999),
        settled(opened("3"), 1),
        settled(opened("4", currency="VND"), 1, price=2**62),
        settled(opened("5", currency="VND"), 1, price=2**62),
        settled(opened("6", currency="VND"), 1, price=2**62 + 1),
    ]
    await ledger.write([], rows)
    lines = await ledger.usage(UsageQuery())
    assert [(line.currency, line.requests, line.price) for line in lines] == [
        ("EUR", 3, Decimal(1)),
        ("VND", 3, Decimal(3 * 2**62 + 1) / 10**12),
    ]


async def test_an_empty_group_writes_nothing(ledger: Ledger) -> None:
    await ledger.write([], [])
    assert await ledger.usage(UsageQuery(group_by=("day",))) == []
