"""`headrace models load`, `unload`, `promote`, `rollback` and `loaded`: the models of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import typer

from headrace.cli.target import ServerAway, target

_URL = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False)
_KEY = typer.Option(None, "--key", help="Bearer token of a key with scope admin.", show_default=False)
_CONFIG = typer.Option(None, "--config", help="TOML file that says where the server is.", show_default=False)
_JSON = typer.Option(False, "--json", help="Print the server's answer as JSON.")
_NAME = typer.Argument(help="NAME, or NAME@VERSION.", metavar="NAME[@VERSION]")


def loaded(url: str | None = _URL, key: str | None = _KEY, config: Path | None = _CONFIG, as_json: bool = _JSON) -> None:
    """List the models of a running server: their states, their memory, and how their last upgrades went."""
    said = _said(url, key, config, "GET", "")
    if as_json:
        typer.echo(json.dumps(said, ensure_ascii=False))
    else:
        _print(said)


def load(name: str = _NAME, url: str | None = _URL, key: str | None = _KEY, config: Path | None = _CONFIG, as_json: bool = _JSON) -> None:
    """Have a running server load a model now."""
    said = _said(url, key, config, "POST", f"/{quote(name)}/load")
    typer.echo(json.dumps(said) if as_json else f"{said['name']} is {said['state']}.")


def unload(name: str = _NAME, url: str | None = _URL, key: str | None = _KEY, config: Path | None = _CONFIG, as_json: bool = _JSON) -> None:
    """Have it unload one, once what runs is over; the next request for the model loads it again."""
    said = _said(url, key, config, "POST", f"/{quote(name)}/unload")
    typer.echo(json.dumps(said) if as_json else f"{said['name']} is {said['state']}.")


def promote(
    name: str = _NAME,
    watch: float | None = typer.Option(None, "--watch", help="Seconds to watch the new version; default is upgrade_watch.", min=0),
    url: str | None = _URL,
    key: str | None = _KEY,
    config: Path | None = _CONFIG,
    as_json: bool = _JSON,
) -> None:
    """Have a model's name stand for this version; 1 is the exit status if the old one is current after all."""
    query = "" if watch is None else f"?watch={watch:g}"
    said = _said(url, key, config, "POST", f"/{quote(name)}/promote{query}")
    typer.echo(json.dumps(said) if as_json else f"{said['new']} took over from {said['old']}.")


def rollback(
    name: str = _NAME, url: str | None = _URL, key: str | None = _KEY, config: Path | None = _CONFIG, as_json: bool = _JSON
) -> None:
    """Have a model's name stand for the version before; ends a promotion that is under way."""
    said = _said(url, key, config, "POST", f"/{quote(name)}/rollback")
    if as_json:
        typer.echo(json.dumps(said))
    elif said["state"] == "promoted":
        typer.echo(f"{said['new']} took over again from {said['old']}.")
    else:
        typer.echo(f"{said['old']} stays: {said['reason']}")


def _said(url: str | None, key: str | None, config: Path | None, method: str, path: str) -> dict[str, Any]:
    try:
        # Loading takes as long as it takes, and a promotion as long as the version is watched.
        return target(url, key, config).administer(method, f"/admin/models{path}", timeout=None)
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error


def _print(said: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NAME", "STATE", "NEEDS", "IN MEMORY", "IDLE", "ALSO"):
        table.add_column(title, justify="right" if title in ("NEEDS", "IN MEMORY", "IDLE") else "left", no_wrap=title == "NAME")
    for model in said["models"]:
        needs = sum((model["needs"] or {}).values())
        idle = model["idle_seconds"]
        also = [*model["aliases"], *(["current"] if model["current"] else []), *(["pinned"] if model["pinned"] else [])]
        table.add_row(
            Text(model["name"]),
            model["state"],
            f"{needs / 2**30:.2f} GiB" if needs else "?",
            f"{model['resident_mib']:,.0f} MiB" if model["resident_mib"] else "-",
            "in use" if model["in_use"] else "-" if idle is None else f"{idle:,.0f} s",
            Text(", ".join(also)),
        )
    console.print(table)
    for pool, memory in said["memory"].items():
        typer.echo(f"{pool}: {memory['held'] / 2**30:.2f} of {memory['budget'] / 2**30:.2f} GiB")
    for family, upgrade in said["upgrades"].items():
        typer.echo(f"{family}: {upgrade['old']} to {upgrade['new']}: {upgrade['state']}. {upgrade['reason']}".strip())
    for each in said["shadows"]:
        likeness = "-" if each["likeness"] is None else f"{each['likeness']:.2f}"
        typer.echo(f"{each['shadow']} beside {each['model']}: {each['compared']} compared, likeness {likeness}, {each['failed']} failed")
