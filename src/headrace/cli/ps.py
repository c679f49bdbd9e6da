"""`headrace ps`: the processes of a running server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from headrace.cli.target import ServerAway, Target, target


def ps(
    url: str | None = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Bearer token.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="Print the server's answer as JSON."),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the server is.", show_default=False),
) -> None:
    """Show a running server's engine workers: state, restarts, load and memory."""
    try:
        said = _ask(target(url, key, config))
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(said, ensure_ascii=False))
    else:
        _print_table(said["workers"])
        _print_others(said)


def _ask(server: Target) -> dict[str, Any]:
    import httpx

    try:
        with server.client(timeout=10) as client:
            answer = client.get(f"{server.root}/admin/ps")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        server.away(error)
    if answer.status_code in (401, 403):
        raise ServerAway(
            f"{server.root} shows its processes only on its own machine or to an administrator's key (HTTP {answer.status_code})."
        )
    try:
        said = answer.json()
    except ValueError:
        said = None
    if answer.status_code != 200 or not isinstance(said, dict) or not isinstance(said.get("workers"), list):
        raise ServerAway(
            f"What answers at {server.root} is not a Headrace server that we can ask for its processes (HTTP {answer.status_code})."
        )
    return said


def _print_table(workers: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ready": "green", "starting": "yellow", "standby": "cyan", "stopping": "yellow", "failed": "red"}
    table = Table(box=None, header_style="bold", pad_edge=False)
    on_gpus = any("gpu_total_mib" in worker for worker in workers)
    titles = ("PID", "MODEL", "STATE", "RESTARTS", "RUNNING", "WAITING", "MEMORY", *(("GPU MEMORY",) if on_gpus else ()))
    for title in titles:
        table.add_column(title, justify="left" if title in ("MODEL", "STATE") else "right")
    for worker in workers:
        state = str(worker.get("state", "?"))
        table.add_row(
            str(worker.get("pid", "?")),
            Text(str(worker.get("model", "?"))),
            Text(state, style=colours.get(state, "")),
            *(str(worker.get(name, "?")) for name in ("restarts", "running", "waiting")),
            _mebibytes(worker),
            *((_gpu(worker),) if on_gpus else ()),
        )
    Console().print(table)


def _print_others(said: dict[str, Any]) -> None:
    """The processes beside the engines, in a line."""
    parts = []
    api, supervisor = said.get("api"), said.get("supervisor")
    if isinstance(api, list):
        parts += [f"API process {process.get('pid')} ({_mebibytes(process)})" for process in api]
    if isinstance(supervisor, dict):
        parts.append(f"supervisor {supervisor.get('pid')} ({_mebibytes(supervisor)})")
    if parts:
        typer.echo(", ".join(parts))


def _gpu(worker: dict[str, Any]) -> str:
    used, total = worker.get("gpu_used_mib"), worker.get("gpu_total_mib")
    return f"{used:,} of {total:,} MiB" if isinstance(used, int) and isinstance(total, int) else ""


def _mebibytes(process: dict[str, Any]) -> str:
    memory = process.get("memory_mib")
    return f"{memory:,.0f} MiB" if isinstance(memory, int | float) else "?"
