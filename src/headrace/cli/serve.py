"""`headrace serve`: start the server and stay until it is stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from headrace.cli.flags import takes_flags


@takes_flags()
def serve(
    model: str | None = typer.Argument(
        None, help="Catalog name, file, folder, hf:OWNER/NAME, ms:OWNER/NAME, URL, or echo.", show_default=False
    ),
    *,
    flags: Mapping[str, Any],
    config: Path | None,
) -> None:
    """Serve MODEL over HTTP; without one, a small demonstration model."""
    from headrace.cli.sources import load

    loaded = load(flags, file=config)

    from headrace.supervisor import serve as supervise

    raise typer.Exit(supervise(loaded.config, lambda: load(flags, file=config).config))
