"""`headrace reload`: a running server reads its configuration again."""

from __future__ import annotations

from pathlib import Path

import typer

from headrace.cli.target import ServerAway, target


def reload(
    url: str | None = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Bearer token of a key with scope admin.", show_default=False),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the server is.", show_default=False),
) -> None:
    """Have a running server read its configuration again, without dropping a request; it refuses a bad one whole."""
    try:
        said = target(url, key, config).administer("POST", "/admin/reload", timeout=120)
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error
    changed = [str(name) for name in said.get("changed", ())]
    typer.echo(f"Reloaded; changed: {', '.join(changed)}." if changed else "Reloaded; no setting has changed.")
