"""The ledger in SQL: the table `usage`, on SQLite or PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import date, timedelta
from decimal import Decimal
from itertools import chain
from operator import itemgetter
from typing import Any, Literal

import sqlalchemy as sa
from msgspec.structs import astuple
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.compiler import SQLCompiler

from headrace.records import UsageGroup, UsageLine, UsageQuery, UsageRow
from headrace.stores.database import Database

SECONDS_A_DAY = 86400
_PART = 10**6
"""Prices are added up in two parts, because SQLite's sums end at 2⁶³."""
_EPOCH = date(1970, 1, 1)

_metadata = sa.MetaData()
usage = sa.Table(
    "usage",
    _metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("opened_at", sa.Double),
    sa.Column("day", sa.Integer),
    sa.Column("tenant", sa.String),
    sa.Column("model", sa.String),
    sa.Column("key", sa.String),
    sa.Column("choices", sa.Integer),
    sa.Column("prompt_tokens", sa.BigInteger),
    sa.Column("cached_tokens", sa.BigInteger),
    sa.Column("completion_tokens", sa.BigInteger),
    sa.Column("finish", sa.String),
    sa.Column("status", sa.String),
    sa.Column("queue_ms", sa.Double),
    sa.Column("prefill_ms", sa.Double),
    sa.Column("decode_ms", sa.Double),
    sa.Column("settled_at", sa.Double),
    sa.Column("price", sa.BigInteger),
    sa.Column("currency", sa.String),
    sa.Column("writer", sa.String),
)
_ROW = [usage.c[name] for name in UsageRow.__struct_fields__]
_FIELDS = [*UsageRow.__struct_fields__, "day"]
_KEPT = frozenset({"id", "opened_at", "day", "tenant", "key"})
"""Columns that are the same when a row is settled."""
_AT_ONCE = (256, 64, 16, 4, 1)
"""Rows in one statement on SQLite."""


class SqlLedger:
    """`ports.Ledger` over a `Database`, which is migrated."""

    def __init__(self, database: Database) -> None:
        self._database = database
        insert = sqlite.insert if database.is_sqlite else postgresql.insert
        # A row that is there already was settled by a group that came earlier, or is written again after a commit of unknown end.
        self._open = _Prepared(insert(usage).on_conflict_do_nothing(index_elements=["id"]), database)
        settle = insert(usage)
        self._settle = _Prepared(
            settle.on_conflict_do_update(
                index_elements=["id"],
                # Columns that are indexed stay as they were opened: to write them again is to write their indexes again.
                set_={column.name: settle.excluded[column.name] for column in usage.c if column.name not in _KEPT},
                where=usage.c.settled_at.is_(None),
            ),
            database,
        )

    async def write(self, opened: Sequence[UsageRow], settled: Sequence[UsageRow]) -> None:
        groups = [(self._open, self._open.values(opened)), (self._settle, self._settle.values(settled))]
        if self._database.is_sqlite:
            await self._database.transact(lambda connection: _write(connection, groups))
            return
        async with self._database.session() as session:
            for insert, values in groups:
                if values:
                    await session.exec_driver_sql(insert.sql, values)

    async def open_rows(self, writer: str) -> list[UsageRow]:
        found = sa.select(*_ROW).where(usage.c.writer == writer, usage.c.settled_at.is_(None)).order_by(usage.c.opened_at, usage.c.id)
        async with self._database.session(read_only=True) as session:
            return [UsageRow(**row) for row in (await session.execute(found)).mappings()]

    async def settled_rows(self, writer: str, since: float) -> list[UsageRow]:
        # There is no index over the writer of settled rows, and one by day. Hardly a request takes longer than one.
        day = int(since // SECONDS_A_DAY) - 1
        found = sa.select(*_ROW).where(usage.c.day >= day, usage.c.writer == writer, usage.c.settled_at >= since)
        async with self._database.session(read_only=True) as session:
            return [UsageRow(**row) for row in (await session.execute(found)).mappings()]

    async def usage(self, query: UsageQuery) -> list[UsageLine]:
        groups = [usage.c[name] for name in query.group_by]
        sums = [
            sa.func.count().label("requests"),
            *(sa.func.sum(usage.c[name]).label(name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")),
            sa.func.count(usage.c.price).label("priced"),
            # Prices are never negative, so both databases divide towards zero alike.
            sa.func.sum(sa.type_coerce(usage.c.price.op("/")(_PART), sa.BigInteger)).label("price_high"),
            sa.func.sum(sa.type_coerce(usage.c.price.op("%")(_PART), sa.BigInteger)).label("price_low"),
        ]
        found = sa.select(*groups, usage.c.currency, *sums).where(*_conditions(query))
        found = found.group_by(*groups, usage.c.currency).order_by(*groups, usage.c.currency)
        async with self._database.session(read_only=True) as session:
            return [_line(query.group_by, row) for row in (await session.execute(found)).mappings()]

    async def used(self, subject: Literal["key", "tenant"], name: str, since: float) -> int:
        tokens = sa.func.coalesce(sa.func.sum(usage.c.prompt_tokens + usage.c.completion_tokens), 0)
        found = sa.select(tokens).where(usage.c[subject] == name, usage.c.opened_at >= since, usage.c.settled_at.is_not(None))
        async with self._database.session(read_only=True) as session:
            return int((await session.execute(found)).scalar_one())


class _Prepared:
    """An insert, compiled once: `sql` in the driver's words, and the order of its values. Compiling it for each group, and each row's
    way through a dictionary, cost more than the database does."""

    def __init__(self, statement: sa.Insert, database: Database) -> None:
        compiled = statement.compile(dialect=database.dialect, column_keys=_FIELDS)
        assert isinstance(compiled, SQLCompiler)
        assert compiled.positiontup is not None, "both drivers number their parameters"
        self.sql = compiled.string
        self._ordered = itemgetter(*map(_FIELDS.index, compiled.positiontup))
        one = f"({', '.join('?' * len(_FIELDS))})"
        self.many = {count: self.sql.replace(one, ", ".join([one] * count), 1) for count in _AT_ONCE} if database.is_sqlite else {}
        """For that many rows."""

    def values(self, rows: Sequence[UsageRow]) -> list[tuple[Any, ...]]:
        ordered = self._ordered
        return [ordered((*astuple(row), int(row.opened_at // SECONDS_A_DAY))) for row in rows]


def _write(connection: sqlite3.Connection, groups: Sequence[tuple[_Prepared, list[tuple[Any, ...]]]]) -> None:
    """Python gives its lock away for each statement that SQLite runs, and gets it back when the event loop has nothing to do: rows that
    came one by one would wait for that one by one."""
    for insert, values in groups:
        begin = 0
        for count in _AT_ONCE:
            while len(values) - begin >= count:
                connection.execute(insert.many[count], tuple(chain.from_iterable(values[begin : begin + count])))
                begin += count


def _conditions(query: UsageQuery) -> list[sa.ColumnElement[bool]]:
    conditions: list[sa.ColumnElement[bool]] = [usage.c.settled_at.is_not(None)]
    if query.since is not None:
        conditions.append(usage.c.opened_at >= query.since)
    if query.until is not None:
        conditions.append(usage.c.opened_at < query.until)
    for name in ("key", "tenant", "model"):
        wanted = getattr(query, name)
        if wanted is not None:
            conditions.append(usage.c[name] == wanted)
    return conditions


def _line(groups: tuple[UsageGroup, ...], row: Any) -> UsageLine:
    return UsageLine(
        group={name: day_name(row[name]) if name == "day" else row[name] for name in groups},
        requests=row["requests"],
        prompt_tokens=int(row["prompt_tokens"]),
        cached_tokens=int(row["cached_tokens"]),
        completion_tokens=int(row["completion_tokens"]),
        price=money(int(row["price_high"]) * _PART + int(row["price_low"])) if row["priced"] else None,
        currency=row["currency"],
    )


def day_name(days: int) -> str:
    """Days since 1970, as `2026-11-21`."""
    return (_EPOCH + timedelta(days=days)).isoformat()


def money(price: int) -> Decimal:
    """A price in the currency's unit, exact, without zeros at its end."""
    whole = Decimal(price).scaleb(-12)
    return whole.quantize(Decimal(1)) if whole == whole.to_integral_value() else whole.normalize()
