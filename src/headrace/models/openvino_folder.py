"""Recognises a folder that holds an OpenVINO model, served where it is."""

from __future__ import annotations

from pathlib import Path

from headrace.errors import ModelError


def is_one(folder: Path) -> bool:
    return (folder / "openvino_model.xml").is_file() and (folder / "openvino_model.bin").is_file()


def check(folder: Path) -> None:
    """Raises `ModelError` where something that serving needs isn't there."""
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json. Copy it, with tokenizer_config.json, from the model's original repository "
            "(or `AutoTokenizer.from_pretrained(…).save_pretrained(folder)` with transformers writes it)."
        )
