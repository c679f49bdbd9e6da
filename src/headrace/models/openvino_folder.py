"""Recognises a folder that holds an OpenVINO model, served where it is."""

from __future__ import annotations

import re
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


def kv_elements(folder: Path) -> int:
    """How many numbers of keys and values a token takes, over all layers: from the graph's variables, of shape [sequence, heads, tokens,
    head size].

    Each is there twice under one name: where it is read, and where it is assigned.
    """
    shapes: dict[str, str] = {}
    with (folder / "openvino_model.xml").open(encoding="utf-8", errors="replace") as graph:
        for line in graph:
            if found := re.search(r'variable_id="([^"]*)".*variable_shape="([^"]*)"', line):
                shapes[found[1]] = found[2]
    elements = 0
    for shape in shapes.values():
        fixed = [int(size) for size in shape.split(",") if size.strip().isdigit()]
        if len(fixed) == 2 and shape.count(",") == 3:
            elements += fixed[0] * fixed[1]
    return elements
