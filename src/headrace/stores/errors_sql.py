"""The error book in SQL: the table `errors`, on SQLite or PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from headrace.error_tracking import MOST
from headrace.records import TrackedError
from headrace.stores.database import Database

_ERRORS = sa.Table(
    "errors",
    sa.MetaData(),
    sa.Column("fingerprint", sa.String, primary_key=True),
    sa.Column("process", sa.String),
    sa.Column("code", sa.String),
    sa.Column("kind", sa.String),
    sa.Column("route", sa.String),
    sa.Column("model", sa.String),
    sa.Column("frames", sa.Text),
    sa.Column("detail", sa.String),
    sa.Column("count", sa.BigInteger),
    sa.Column("first_seen", sa.Double),
    sa.Column("last_seen", sa.Double),
    sa.Column("request_id", sa.String),
    sa.Column("version", sa.String),
)
_LENGTHS = {"process": 160, "code": 160, "kind": 200, "route": 200, "model": 200, "detail": 200, "request_id": 160, "version": 40}
"""Longest texts of the columns."""


class SqlErrors:
    """`ports.ErrorBook` over a `Database`, which is migrated. `most` fingerprints are kept."""

    def __init__(self, database: Database, *, most: int = MOST) -> None:
        self._database = database
        self._most = most
        insert = (sqlite.insert if database.is_sqlite else postgresql.insert)(_ERRORS)
        new = insert.excluded
        later = new.last_seen >= _ERRORS.c.last_seen
        kept = {"fingerprint", "count", "first_seen", "last_seen", "request_id"}
        self._add = insert.on_conflict_do_update(
            index_elements=["fingerprint"],
            set_={
                "count": _ERRORS.c.count + new["count"],
                "first_seen": sa.case((new.first_seen < _ERRORS.c.first_seen, new.first_seen), else_=_ERRORS.c.first_seen),
                "last_seen": sa.case((later, new.last_seen), else_=_ERRORS.c.last_seen),
                "request_id": sa.case((sa.and_(later, new.request_id != ""), new.request_id), else_=_ERRORS.c.request_id),
                **{name: sa.case((later, new[name]), else_=column) for name, column in _ERRORS.c.items() if name not in kept},
            },
        )

    async def add(self, errors: Sequence[TrackedError]) -> None:
        if not errors:
            return
        newest = sa.select(_ERRORS.c.fingerprint).order_by(_ERRORS.c.last_seen.desc(), _ERRORS.c.fingerprint).limit(self._most)
        # In one order, so that two servers that share a database wait for each other instead of both for both.
        rows = sorted(map(_row, errors), key=lambda row: row["fingerprint"])
        async with self._database.session() as session:
            await session.execute(self._add, rows)
            held = (await session.execute(sa.select(sa.func.count()).select_from(_ERRORS))).scalar_one()
            if held > self._most:
                await session.execute(sa.delete(_ERRORS).where(_ERRORS.c.fingerprint.not_in(newest)))

    async def newest(self, *, limit: int = 20, since: float = 0.0) -> list[TrackedError]:
        found = (
            sa.select(_ERRORS).where(_ERRORS.c.last_seen >= since).order_by(_ERRORS.c.last_seen.desc(), _ERRORS.c.fingerprint).limit(limit)
        )
        async with self._database.session(read_only=True) as session:
            return [_error(row) for row in (await session.execute(found)).mappings()]


def _row(error: TrackedError) -> dict[str, Any]:
    row = msgspec.structs.asdict(error)
    row["frames"] = "\n".join(error.frames)
    for name, longest in _LENGTHS.items():
        # PostgreSQL has no NUL in texts.
        row[name] = row[name].replace("\0", "")[:longest].encode("utf-8", "replace").decode()
    return row


def _error(row: Any) -> TrackedError:
    return TrackedError(**{**row, "frames": tuple(row["frames"].splitlines())})
