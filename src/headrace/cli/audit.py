"""`headrace audit`: who created, changed, revoked what."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import typer

from headrace.cli.key_desk import at_the_desk


def audit(
    since: str | None = typer.Option(None, "--since", help="From so long ago, or from a date: 7d, 2030-01-31.", show_default=False),
    limit: int = typer.Option(1000, "--limit", min=1, help="Most entries, the newest."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the database is.", show_default=False),
) -> None:
    """Show the audit log, oldest first: who created, changed, rotated or revoked which key or tenant."""
    import msgspec

    from headrace.http.admin_keys import since_of

    start = since_of(since) if since else 0.0
    entries = at_the_desk(config, lambda desk, actor: desk.audit(actor, since=start, limit=limit))
    if as_json:
        typer.echo(msgspec.json.encode({"entries": entries}).decode())
        return
    for entry in entries:
        when = datetime.fromtimestamp(entry.at).astimezone().isoformat(timespec="seconds")
        typer.echo(f"{when}  {entry.actor}  {entry.action}  {entry.subject}  {json.dumps(entry.details, ensure_ascii=False)}")
