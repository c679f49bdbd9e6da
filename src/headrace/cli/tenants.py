"""`headrace tenants`: groups of keys, and the limits over all keys of a group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from headrace.cli.key_desk import at_the_desk, limits, moment, table
from headrace.errors import ConfigError

app = typer.Typer(name="tenants", help="Groups of keys, and their limits: create, list, set.", no_args_is_help=True, add_completion=False)

_CONFIG = typer.Option(None, "--config", help="TOML file that says where the database is.", metavar="FILE", show_default=False)
_JSON = typer.Option(False, "--json", help="Print JSON.")
_RPM = typer.Option(None, "--rpm", min=0, help="Requests a minute; 0 takes the limit away.", show_default=False)
_TPM = typer.Option(None, "--tpm", min=0, help="Tokens a minute; 0 takes the limit away.", show_default=False)
_CONCURRENCY = typer.Option(None, "--concurrency", min=0, help="Requests at a time; 0 takes the limit away.", show_default=False)
_BUDGET = typer.Option(None, "--budget-tokens", min=0, help="Tokens in each period; 0 takes the budget away.", show_default=False)
_PERIOD = typer.Option(None, "--period", help="Of the budget: day, month (default) or total.", show_default=False)


@app.command()
def create(
    name: str = typer.Argument(..., help="What keys name with --tenant."),
    rpm: int | None = _RPM,
    tpm: int | None = _TPM,
    concurrency: int | None = _CONCURRENCY,
    budget_tokens: int | None = _BUDGET,
    period: str | None = _PERIOD,
    as_json: bool = _JSON,
    config: Path | None = _CONFIG,
) -> None:
    """Make a tenant. One that a key names is made by itself, without limits."""
    _put(name, _changes(rpm, tpm, concurrency, budget_tokens, period), as_json, config, new=True)


@app.command("set")
def set_limits(
    name: str = typer.Argument(..., help="The tenant."),
    rpm: int | None = _RPM,
    tpm: int | None = _TPM,
    concurrency: int | None = _CONCURRENCY,
    budget_tokens: int | None = _BUDGET,
    period: str | None = _PERIOD,
    as_json: bool = _JSON,
    config: Path | None = _CONFIG,
) -> None:
    """Change the limits that are named; the others stay."""
    _put(name, _changes(rpm, tpm, concurrency, budget_tokens, period), as_json, config, new=False)


@app.command("list")
def list_tenants(as_json: bool = _JSON, config: Path | None = _CONFIG) -> None:
    """Show all tenants with their limits."""
    from headrace.policies.key_desk import public_tenant

    tenants = [public_tenant(record) for record in at_the_desk(config, lambda desk, actor: desk.tenants(actor))]
    if as_json:
        typer.echo(json.dumps({"tenants": tenants}, ensure_ascii=False))
        return
    table(("NAME", "LIMITS", "CREATED"), [(tenant["name"], limits(tenant), moment(tenant["created_at"])) for tenant in tenants])


def _changes(
    rpm: int | None, tpm: int | None, concurrency: int | None, budget_tokens: int | None, period: str | None
) -> dict[str, int | str | None]:
    if period not in (None, "day", "month", "total"):
        raise typer.BadParameter("a period is day, month or total", param_hint="--period")
    given = {"rpm": rpm, "tpm": tpm, "concurrency": concurrency, "budget_tokens": budget_tokens}
    changes: dict[str, int | str | None] = {name: value or None for name, value in given.items() if value is not None}
    return changes | ({"budget_period": period} if period is not None else {})


def _put(name: str, changes: dict[str, int | str | None], as_json: bool, config: Path | None, *, new: bool) -> None:
    from headrace.policies.key_desk import KeyDesk, public_tenant
    from headrace.policies.mint import Actor

    async def put(desk: KeyDesk, actor: Actor) -> dict[str, Any]:
        known = name in {tenant.name for tenant in await desk.tenants(actor)}
        if known and new:
            raise ConfigError(f"There is a tenant {name!r} already; `headrace tenants set` changes its limits.")
        if not known and not new:
            raise ConfigError(f"There is no tenant {name!r}; `headrace tenants create` makes one.")
        return public_tenant(await desk.put_tenant(name, changes, actor))

    tenant = at_the_desk(config, put)
    typer.echo(json.dumps(tenant, ensure_ascii=False) if as_json else f"{tenant['name']}: limits {limits(tenant)}")
