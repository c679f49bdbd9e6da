"""`headrace reload`: a running server reads its configuration again."""

from __future__ import annotations

from pathlib import Path

import typer

from headrace.cli.target import ServerAway, Target, target


def reload(
    url: str | None = typer.Option(None, "--url", help="The server; default is this machine's, as configured.", show_default=False),
    key: str | None = typer.Option(None, "--key", help="Bearer token of a key with scope admin.", show_default=False),
    config: Path | None = typer.Option(None, "--config", help="TOML file that says where the server is.", show_default=False),
) -> None:
    """Have a running server read its configuration again, without dropping a request; it refuses a bad one whole."""
    try:
        changed = _ask(target(url, key, config))
    except ServerAway as error:
        typer.echo(f"headrace: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"Reloaded; changed: {', '.join(changed)}." if changed else "Reloaded; no setting has changed.")


def _ask(server: Target) -> list[str]:
    import httpx

    try:
        with server.client(timeout=120) as client:
            answer = client.post(f"{server.root}/admin/reload")
        said = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        server.away(error)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ServerAway(f"What answers at {server.root} is not a Headrace server (HTTP {answer.status_code}).")
    if answer.status_code != 200:
        raise ServerAway(str(said.get("detail") or f"{server.root} answers {answer.status_code}."))
    return [str(name) for name in said.get("changed", ())]
