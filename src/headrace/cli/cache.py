"""`headrace cache`: purge a running server's kept answers, and see how full its cache is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from headrace.cli.target import ServerAway, Target, target

app = typer.Typer(name="cache", help="The response cache of a running server.", no_args_is_help=True)

_URL = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False)
_BEARER = typer.Option(None, "--bearer", help="Bearer token of a key with scope admin.", show_default=False)
_CONFIG = typer.Option(None, "--config", help="TOML file with the server's configuration.", show_default=False)
_JSON = typer.Option(False, "--json", help="Print the server's answer as JSON.")


@app.command("purge")
def purge(
    tenant: str | None = typer.Option(None, "--tenant", help="Only this tenant's answers.", show_default=False),
    model: str | None = typer.Option(None, "--model", help="Only this model's answers.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Only answers that requests with this key (its id) made.", show_default=False),
    url: str | None = _URL,
    bearer: str | None = _BEARER,
    config: Path | None = _CONFIG,
    as_json: bool = _JSON,
) -> None:
    """Drop kept answers: those with all that is named, or every one."""
    wanted = {name: value for name, value in (("tenant", tenant), ("model", model), ("key", key)) if value is not None}
    said = _said(url, bearer, config, "DELETE", wanted)
    purged = said["purged"]
    typer.echo(json.dumps(said) if as_json else f"{purged} answer{'' if purged == 1 else 's'} purged.")


@app.command("stats")
def stats(url: str | None = _URL, bearer: str | None = _BEARER, config: Path | None = _CONFIG, as_json: bool = _JSON) -> None:
    """How full each level is, and what one API process has looked up since it started."""
    said = _said(url, bearer, config, "GET", {})
    typer.echo(json.dumps(said) if as_json else "\n".join(_lines(said)))


def _said(url: str | None, bearer: str | None, config: Path | None, method: str, parameters: dict[str, str]) -> dict[str, Any]:
    try:
        return _ask(target(url, bearer, config), method, parameters)
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error


def _ask(server: Target, method: str, parameters: dict[str, str]) -> dict[str, Any]:
    import httpx

    try:
        with server.client(timeout=60) as client:
            answer = client.request(method, f"{server.root}/admin/cache", params=parameters)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        server.away(error)
    try:
        said: dict[str, Any] = answer.json()
    except ValueError:
        said = {}
    if answer.status_code != 200 or not isinstance(said, dict):
        raise ServerAway(
            f"{server.root} answers {answer.status_code}: {said.get('detail') if isinstance(said, dict) else answer.reason_phrase}"
        )
    return said


def _lines(said: dict[str, Any]) -> list[str]:
    if said.get("response_cache") == "off":
        return ["The response cache is off."]
    lines = []
    for name, size in said["levels"].items():
        if size is None:
            lines.append(f"{name}: doesn't answer")
        else:
            weight = f", {size['bytes'] / 1048576:.1f} MiB" if size["bytes"] is not None else ""
            lines.append(f"{name}: {size['entries']} answers{weight}")
    lines.append("process: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in said["process"].items()))
    return lines
