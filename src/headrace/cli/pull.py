"""`headrace pull`: bring a model to this machine."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from headrace.cli.flags import takes_flags


@takes_flags("hub", "weights", "cache_dir", "offline", "trust_remote_code")
def pull(
    name: str = typer.Argument(help="Catalog name (`headrace models`), hf:OWNER/NAME, ms:OWNER/NAME, file or folder."),
    *,
    flags: Mapping[str, Any],
    config: Path | None,
) -> None:
    """Fetch a model, check it, and convert it for serving where it has to be. Prints its folder."""
    from headrace.cli.sources import load

    section = load(flags, file=config).config.model
    if not sys.stderr.isatty():  # instead of bars, the models' log lines
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    from headrace.models import resolve

    files = resolve.pull(name, section)
    if files.kind in ("openvino", "transformers", "vllm"):
        typer.echo(f"{files.name} is ready: `headrace serve {name}`", err=True)
        typer.echo(files.folder)
    else:
        typer.echo(f"{name} needs no files.", err=True)
