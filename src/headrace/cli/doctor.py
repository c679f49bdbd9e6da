"""`headrace doctor`: looks at what serving needs, and says what to do about what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from headrace.cli.flags import takes_flags

_MARKS = {"ok": "✓", "warning": "!", "failed": "✗"}
_COLOURS = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "failed": typer.colors.RED}


@takes_flags(
    "host",
    "port",
    "context",
    "engine",
    "quantize",
    "dtype",
    "device",
    "gpu_memory_utilization",
    "kv_cache_gib",
    "threads",
    "cache_dir",
    "hub",
)
def doctor(
    model: str | None = typer.Argument(None, help="The model to be served; default is the configured one.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="One JSON object: ok, and the checks."),
    *,
    flags: Mapping[str, Any],
    config: Path | None,
) -> None:
    """Check cores, memory, packages, processor, model fit, port and disk. Exit status 1 when something makes serving impossible."""
    from headrace.cli.checks import all_checks
    from headrace.cli.sources import load

    checks = all_checks(load(flags, file=config).config)
    possible = all(check.status != "failed" for check in checks)
    if as_json:
        said = [
            {"name": check.name, "status": check.status, "detail": check.detail, "advice": check.advice, "facts": check.facts}
            for check in checks
        ]
        typer.echo(json.dumps({"ok": possible, "checks": said}, ensure_ascii=False, indent=2))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            typer.secho(f"{_MARKS[check.status]} ", fg=_COLOURS[check.status], nl=False)
            typer.echo(f"{check.name:<{width}}  {check.detail}")
            if check.advice:
                typer.echo(f"  {'':<{width}}  → {check.advice}")
        typer.echo("\n" + ("Headrace can serve here." if possible else "Headrace can't serve here until what is marked ✗ is mended."))
    if not possible:
        raise typer.Exit(1)
