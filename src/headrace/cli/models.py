"""`headrace models`: the models that have names, and those on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headrace.cli import several_models
from headrace.cli.flags import takes_flags

if TYPE_CHECKING:
    from headrace.models.catalog import CatalogEntry
    from headrace.models.resolve import LocalModel


app = typer.Typer(name="models", invoke_without_command=True)
for command in (several_models.loaded, several_models.load, several_models.unload, several_models.promote, several_models.rollback):
    app.command()(command)


@app.callback()
@takes_flags("cache_dir")
def models(
    context: typer.Context,
    as_json: bool = typer.Option(False, "--json", help="One JSON object: catalog and cache; sizes are bytes."),
    *,
    flags: Mapping[str, Any],
    config: Path | None,
) -> None:
    """List the catalog (size, licence, languages) and what is in the cache; or do something with the models of a running server."""
    if context.invoked_subcommand is not None:
        return
    from headrace.cli.sources import load

    folder = load(flags, file=config).config.model.cache_dir

    from headrace.models import catalog, resolve

    entries, local = catalog.entries(), resolve.local_models(folder)
    if as_json:
        import msgspec

        by_name = {model.name: model for model in local}
        said = [{**msgspec.to_builtins(entry), "cached": entry.name in by_name} for entry in entries]
        typer.echo(json.dumps({"catalog": said, "cache": msgspec.to_builtins(local)}, ensure_ascii=False, indent=2))
    else:
        _print(entries, local, folder)


def _print(entries: list[CatalogEntry], local: list[LocalModel], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    cached = {model.name for model in local}
    catalog = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NAME", "DOWNLOAD", "MEMORY", "LICENCE", "LANGUAGES", "HERE"):
        catalog.add_column(title, justify="right" if title in ("DOWNLOAD", "MEMORY") else "left", overflow="fold", no_wrap=title == "NAME")
    for entry in entries:
        here = "yes" if entry.name in cached else "-"
        catalog.add_row(
            entry.name, readable(entry.size), readable(entry.memory), entry.licence, ", ".join(entry.languages), here, end_section=False
        )
    console = Console()
    console.print(catalog)
    console.print(f"\nIn the cache, {folder}:", markup=False, highlight=False, soft_wrap=True)
    if not local:
        console.print("nothing yet; `headrace pull NAME` fetches a model.", highlight=False)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("NAME", "ON DISK", "CONTEXT", "SOURCE"):
        table.add_column(title, justify="right" if title in ("ON DISK", "CONTEXT") else "left", overflow="fold", no_wrap=title == "NAME")
    for model in local:
        table.add_row(model.name, readable(model.size), str(model.context_length), model.source)
    console.print(table)


def readable(size: float) -> str:
    """Bytes for a person, in decimal units as disks and hubs count them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
