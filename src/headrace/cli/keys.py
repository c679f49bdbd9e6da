"""`headrace keys`: create, list, show, revoke and rotate API keys."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import typer

from headrace.cli.key_desk import at_the_desk, limits, moment, table

app = typer.Typer(name="keys", help="API keys: create, list, show, revoke, rotate.", no_args_is_help=True, add_completion=False)

_CONFIG = typer.Option(None, "--config", help="TOML file that says where the database is.", metavar="FILE", show_default=False)
_JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command()
def create(
    name: str = typer.Option(..., "--name", help="What people call it."),
    tenant: str | None = typer.Option(
        None, "--tenant", help="Group that it belongs to; default is one of its own, or all for an administrator's.", show_default=False
    ),
    models: str | None = typer.Option(None, "--models", help="Models it may use, comma-separated; default is all.", show_default=False),
    scopes: str = typer.Option("inference", "--scopes", help="inference, usage, admin; comma-separated."),
    rpm: int | None = typer.Option(None, "--rpm", min=1, help="Requests a minute.", show_default=False),
    tpm: int | None = typer.Option(None, "--tpm", min=1, help="Tokens a minute.", show_default=False),
    concurrency: int | None = typer.Option(None, "--concurrency", min=1, help="Requests at a time.", show_default=False),
    budget_tokens: int | None = typer.Option(None, "--budget-tokens", min=1, help="Tokens in each period.", show_default=False),
    period: str | None = typer.Option(None, "--period", help="Of the budget: day, month (default) or total.", show_default=False),
    priority: str | None = typer.Option(
        None, "--priority", help="Highest of its requests: sheddable, default (default) or critical.", show_default=False
    ),
    expires: str | None = typer.Option(None, "--expires", help="When it ends: 30d, 12h, or a date as 2030-01-31.", show_default=False),
    as_json: bool = _JSON,
    config: Path | None = _CONFIG,
) -> None:
    """Make a key. Its secret is printed once, and kept nowhere."""
    from headrace.http.admin_wire import moment_of
    from headrace.policies.key_desk import public
    from headrace.policies.mint import SCOPES, Wish
    from headrace.types import PRIORITIES

    wanted = frozenset(scope for scope in SCOPES if scope in _words(scopes))
    unknown = set(_words(scopes)) - wanted
    if unknown or not wanted:
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown)) or 'nothing'} is no scope; there is {', '.join(SCOPES)}", param_hint="--scopes"
        )
    if models is not None and not _words(models):
        # An empty variable in somebody's script must not make a key for all of them.
        raise typer.BadParameter("it names no model; leave it out for all of them", param_hint="--models")
    if priority not in (None, *PRIORITIES):
        raise typer.BadParameter(f"a priority is one of {', '.join(PRIORITIES)}", param_hint="--priority")
    if period not in (None, "day", "month", "total"):
        raise typer.BadParameter("a period is day, month or total", param_hint="--period")
    try:
        expires_at = None if expires is None else moment_of(expires, time.time())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--expires") from None
    wish = Wish(
        name=name,
        tenant=tenant,
        models=tuple(_words(models or "")),
        scopes=wanted,
        rpm=rpm,
        tpm=tpm,
        concurrency=concurrency,
        budget_tokens=budget_tokens,
        budget_period=period,
        priority=priority,
        expires_at=expires_at,
    )
    record, secret = at_the_desk(config, lambda desk, actor: desk.create(wish, actor))
    _print_with_secret(public(record), secret, as_json)


@app.command("list")
def list_keys(as_json: bool = _JSON, config: Path | None = _CONFIG) -> None:
    """Show all keys, without their secrets."""
    from headrace.policies.key_desk import public

    keys = [public(record) for record in at_the_desk(config, lambda desk, actor: desk.keys(actor))]
    if as_json:
        typer.echo(json.dumps({"keys": keys}, ensure_ascii=False))
        return
    rows: list[tuple[str, ...]] = []
    for key in keys:
        models, scopes = ", ".join(key["models"]) or "all", ", ".join(key["scopes"])
        rows.append((key["id"], key["prefix"] + "…", key["name"], key["status"], _tenant(key), models, scopes))
    table(("ID", "SECRET", "NAME", "STATUS", "TENANT", "MODELS", "SCOPES"), rows)


@app.command()
def show(key: str = typer.Argument(..., help="Its id."), as_json: bool = _JSON, config: Path | None = _CONFIG) -> None:
    """Show everything about one key but its secret."""
    from headrace.policies.key_desk import public

    _print(public(at_the_desk(config, lambda desk, actor: desk.key(key, actor))), as_json)


@app.command()
def revoke(key: str = typer.Argument(..., help="Its id."), as_json: bool = _JSON, config: Path | None = _CONFIG) -> None:
    """End a key for good, in all running servers within a second."""
    from headrace.policies.key_desk import public

    _print(public(at_the_desk(config, lambda desk, actor: desk.revoke(key, actor))), as_json)


@app.command()
def rotate(
    key: str = typer.Argument(..., help="Its id."),
    grace: str | None = typer.Option(
        None, "--grace", help="How long the old secret goes on: 12h, 7d. Default: it ends at once.", show_default=False
    ),
    as_json: bool = _JSON,
    config: Path | None = _CONFIG,
) -> None:
    """Give a key a new secret, which is printed once."""
    from headrace.http.admin_wire import seconds_of
    from headrace.policies.key_desk import public

    try:
        seconds = 0.0 if grace is None else seconds_of(grace)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--grace") from None
    record, secret = at_the_desk(config, lambda desk, actor: desk.rotate(key, actor, grace=seconds))
    _print_with_secret(public(record), secret, as_json)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _tenant(key: dict[str, Any]) -> str:
    return "(all)" if key["all_tenants"] else key["tenant"] if key["tenant"] != key["id"] else "(its own)"


def _print_with_secret(key: dict[str, Any], secret: str, as_json: bool) -> None:
    """The secret alone goes to the standard output, so that a script can take it."""
    if as_json:
        typer.echo(json.dumps({**key, "secret": secret}, ensure_ascii=False))
        return
    sys.stderr.write(f"Key {key['id']} ({key['name']}). This is its secret; it is not shown again:\n")
    sys.stderr.flush()
    typer.echo(secret)


def _print(key: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(key, ensure_ascii=False))
        return
    lines = {
        "id": key["id"],
        "name": key["name"],
        "secret": key["prefix"] + "…",
        "status": key["status"],
        "tenant": _tenant(key),
        "models": ", ".join(key["models"]) or "all",
        "scopes": ", ".join(key["scopes"]),
        "priority": key["priority"],
        "limits": limits(key),
        "created": f"{moment(key['created_at'])} by {key['created_by']}",
        "expires": moment(key["expires_at"]),
        "revoked": moment(key["revoked_at"]),
    }
    for name, value in lines.items():
        typer.echo(f"{name:<8} {value}")
