"""The ledger in memory, for tests: what it holds ends with the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from headrace.records import UsageGroup, UsageLine, UsageQuery, UsageRow
from headrace.stores.ledger_sql import SECONDS_A_DAY, day_name, money


class MemoryLedger:
    """`ports.Ledger`."""

    def __init__(self) -> None:
        self.rows: dict[str, UsageRow] = {}

    async def write(self, opened: Sequence[UsageRow], settled: Sequence[UsageRow]) -> None:
        for row in opened:
            self.rows.setdefault(row.id, row)
        for row in settled:
            known = self.rows.get(row.id)
            if known is None or known.settled_at is None:
                self.rows[row.id] = row

    async def open_rows(self, writer: str) -> list[UsageRow]:
        found = [row for row in self.rows.values() if row.writer == writer and row.settled_at is None]
        return sorted(found, key=lambda row: (row.opened_at, row.id))

    async def settled_rows(self, writer: str, since: float) -> list[UsageRow]:
        return [row for row in self.rows.values() if row.writer == writer and row.settled_at is not None and row.settled_at >= since]

    async def usage(self, query: UsageQuery) -> list[UsageLine]:
        groups: dict[tuple[Any, ...], list[UsageRow]] = {}
        for row in self.rows.values():
            if _wanted(row, query):
                groups.setdefault((*(_value(row, name) for name in query.group_by), row.currency), []).append(row)
        return [_line(query.group_by, groups[found]) for found in sorted(groups)]

    async def used(self, subject: Literal["key", "tenant"], name: str, since: float) -> int:
        return sum(
            row.prompt_tokens + row.completion_tokens
            for row in self.rows.values()
            if getattr(row, subject) == name and row.opened_at >= since and row.settled_at is not None
        )


def _wanted(row: UsageRow, query: UsageQuery) -> bool:
    return (
        row.settled_at is not None
        and (query.since is None or row.opened_at >= query.since)
        and (query.until is None or row.opened_at < query.until)
        and all(getattr(query, name) in (None, getattr(row, name)) for name in ("key", "tenant", "model"))
    )


def _value(row: UsageRow, group: UsageGroup) -> str:
    if group == "day":
        return day_name(int(row.opened_at // SECONDS_A_DAY))
    value: str = getattr(row, group)
    return value


def _line(groups: tuple[UsageGroup, ...], rows: list[UsageRow]) -> UsageLine:
    prices = [row.price for row in rows if row.price is not None]
    return UsageLine(
        group={name: _value(rows[0], name) for name in groups},
        requests=len(rows),
        prompt_tokens=sum(row.prompt_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        completion_tokens=sum(row.completion_tokens for row in rows),
        price=money(sum(prices)) if prices else None,
        currency=rows[0].currency,
    )
