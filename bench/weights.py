"""The model that is measured: its converted files, and the GGUF file that they come from."""

from __future__ import annotations

from pathlib import Path

from bench.servers import ServerFailed
from headrace.cli.sources import load
from headrace.errors import HeadraceError
from headrace.models.card import read_card
from headrace.models.resolve import resolve
from headrace.types import ModelFiles


def find_model(name: str) -> ModelFiles:
    """The model as `headrace serve NAME` would load it, fetched if it has to be. Raises `ServerFailed`."""
    try:
        return resolve(load({"model": name}, folder=Path(__file__).parent).config.model)
    except HeadraceError as error:
        raise ServerFailed(error.message) from error


def find_gguf(files: ModelFiles, given: str | None) -> Path:
    """The file given, or the one that the model was converted from. Raises `ServerFailed`."""
    if given is not None:
        path = Path(given).expanduser()
    else:
        card = read_card(Path(files.folder))
        name = next((name for name in card.hashes if name.endswith(".gguf")), "")
        source = Path(card.source)
        folder = Path(files.folder)
        path = source if source.is_absolute() else folder.parent.parent / "files" / folder.name / name
    if not path.is_file():
        raise ServerFailed(f"The GGUF file of {files.name} isn't at {path}; give --gguf FILE.")
    return path.absolute()
