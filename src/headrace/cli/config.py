"""`headrace config`: the effective configuration, and where each value came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from headrace.cli.flags import takes_flags


@takes_flags()
def config(
    model: str | None = typer.Argument(None, help="As for serve.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="One JSON object: by name, the value and its source."),
    *,
    flags: Mapping[str, Any],
    config: Path | None,
) -> None:
    """Show the effective configuration, each value with where it came from; secrets are hidden.

    Takes the same flags as serve, to see what they would change.
    """
    from headrace.cli.sources import environment_names, load, shown
    from headrace.config import sections

    loaded = load(flags, file=config)
    if as_json:
        said: dict[str, object] = {}
        for section, cls in sections().items():
            for field in cls.model_fields:
                origin = loaded.origins[field]
                value = shown(field, getattr(getattr(loaded.config, section), field))
                said[field] = {"value": value, "source": origin.kind, "origin": str(origin)}
        typer.echo(json.dumps(said, indent=2, ensure_ascii=False))
        return

    for section, cls in sections().items():
        typer.echo(f"# {section}: {(cls.__doc__ or '').strip()}")
        rows = []
        for field in cls.model_fields:
            value = shown(field, getattr(getattr(loaded.config, section), field))
            rows.append((field, _as_toml(value), str(loaded.origins[field]), " ".join(environment_names(field))))
        names, values = (max(len(row[column]) for row in rows) for column in (0, 1))
        for name, shown_value, source, variables in rows:
            settable = f"  ({variables})" if source == "default" else ""
            typer.echo(f"{name:<{names}}  {shown_value:<{values}}  {source}{settable}")
        typer.echo()


def _as_toml(value: object) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)
