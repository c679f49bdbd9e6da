"""`headrace errors`: what went wrong of late, from the database itself, whether a server runs or not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from headrace.cli.key_desk import moment, table

if TYPE_CHECKING:
    from headrace.config import Config
    from headrace.records import TrackedError


def errors(
    limit: int = typer.Option(20, "--limit", min=1, help="Most errors, those seen last."),
    since: str | None = typer.Option(None, "--since", help="Seen so long ago, or since a date: 7d, 2030-01-31.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the database is.", show_default=False),
) -> None:
    """Show the last distinct errors with their counts: failures of ours, of engines and of stores, and processes that died."""
    import msgspec

    from headrace.cli.sources import load
    from headrace.http.admin_keys import since_of

    found = asyncio.run(_newest(load(file=config).config, limit, since_of(since) if since else 0.0))
    if as_json:
        typer.echo(msgspec.json.encode({"errors": found}).decode())
    elif not found:
        typer.echo("No errors since then." if since else "No errors.")
    else:
        _print(found)


async def _newest(config: Config, limit: int, since: float) -> list[TrackedError]:
    from headrace.stores.data_dir import database_url
    from headrace.stores.database import Database
    from headrace.stores.errors_sql import SqlErrors
    from headrace.stores.opening import prepare_stores

    await prepare_stores(config.store)
    database = Database(database_url(config.store))
    try:
        return await SqlErrors(database).newest(limit=limit, since=since)
    finally:
        await database.close()


def _print(found: list[TrackedError]) -> None:
    rows: list[tuple[str, ...]] = []
    for error in found:
        what = [error.code, error.kind, error.detail, f"{error.fingerprint} {error.request_id}"]
        where = [error.process, error.route, error.model, *(frame.removeprefix("headrace.") for frame in error.frames[-1:])]
        when = f"{moment(error.last_seen)}\n{moment(error.first_seen)}"
        rows.append((f"{error.count:,}", when, "\n".join(filter(None, what)), "\n".join(filter(None, where))))
    table(("COUNT", "LAST SEEN, FIRST SEEN", "ERROR, FINGERPRINT, A REQUEST", "WHERE"), rows)
