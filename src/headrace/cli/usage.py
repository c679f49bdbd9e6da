"""`headrace usage`: the bill, from the database itself, whether a server runs or not."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from headrace.cli.key_desk import table

if TYPE_CHECKING:
    from headrace.config import Config
    from headrace.records import UsageLine, UsageQuery


def usage(
    by: str = typer.Option("day,model", "--by", help="key, tenant, model, day; several with commas."),
    since: str | None = typer.Option(None, "--since", help="From so long ago, or from a date: 7d, 2030-01-31.", show_default=False),
    until: str | None = typer.Option(None, "--until", help="Up to then, likewise.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Only this key's, by its id.", show_default=False),
    tenant: str | None = typer.Option(None, "--tenant", help="Only this tenant's.", show_default=False),
    model: str | None = typer.Option(None, "--model", help="Only this model's.", show_default=False),
    as_csv: bool = typer.Option(False, "--csv", help="Print CSV."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the database is.", show_default=False),
) -> None:
    """Show what was used: requests, tokens and, where models have prices, money."""
    import msgspec

    from headrace.cli.sources import load
    from headrace.http.admin_keys import since_of
    from headrace.policies import bill
    from headrace.records import UsageQuery

    try:
        groups = bill.groups_of(by)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--by") from None
    query = UsageQuery(
        group_by=groups,
        since=since_of(since) if since else None,
        until=since_of(until) if until else None,
        key=key,
        tenant=tenant,
        model=model,
    )
    lines = asyncio.run(_lines(load(file=config).config, query))
    if as_csv:
        sys.stdout.write(bill.as_csv(groups, lines))
    elif as_json:
        typer.echo(msgspec.json.encode({"usage": [bill.as_json(line) for line in lines]}).decode())
    else:
        _print(query, lines)


async def _lines(config: Config, query: UsageQuery) -> list[UsageLine]:
    from headrace.stores.data_dir import database_url
    from headrace.stores.database import Database
    from headrace.stores.ledger_sql import SqlLedger
    from headrace.stores.opening import prepare_stores

    await prepare_stores(config.store)
    database = Database(database_url(config.store))
    try:
        return await SqlLedger(database).usage(query)
    finally:
        await database.close()


def _print(query: UsageQuery, lines: list[UsageLine]) -> None:
    if not lines:
        typer.echo("Nothing was used.")
        return
    priced = any(line.price is not None for line in lines)
    titles = (*(name.upper() for name in query.group_by), "REQUESTS", "PROMPT", "CACHED", "COMPLETION", *(("PRICE",) if priced else ()))
    rows = []
    for line in lines:
        row = [line.group[name] or "-" for name in query.group_by]
        row += [f"{count:,}" for count in (line.requests, line.prompt_tokens, line.cached_tokens, line.completion_tokens)]
        if priced:
            row.append("-" if line.price is None else f"{line.price:,f} {line.currency}")
        rows.append(tuple(row))
    table(titles, rows)
