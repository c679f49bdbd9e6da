"""A benchmark's options are the keyword arguments of its `run`: one place for their names, types and defaults."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Any


def parser_for(run: Callable[..., object], *, prog: str, description: str) -> argparse.ArgumentParser:
    """`--users 4` for `users: int`, `--sequences 1,4` for `tuple[int, ...]`. Raises `TypeError` for a type it doesn't know."""
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, parameter in inspect.signature(run, eval_str=True).parameters.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=_reader(parameter.annotation), default=parameter.default, help=" ", metavar=name.upper()
        )
    parser.add_argument("--record", action="store_true", help="append the result to bench/RESULTS.md")
    return parser


def _reader(annotation: Any) -> Callable[[str], Any]:
    if annotation in (int, float, str):
        return annotation  # type: ignore[no-any-return]
    if annotation == str | None:
        return str
    if annotation == int | None:
        return int
    if annotation == tuple[int, ...]:
        return _integers
    raise TypeError(f"no option can be made for {annotation!r}")


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
