"""How sums of usage are written down, for programs (JSON), for spreadsheets (CSV) and for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, cast

from headrace.records import USAGE_GROUPS, UsageGroup, UsageLine

_COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")


def groups_of(text: str) -> tuple[UsageGroup, ...]:
    """Comma-separated groups, in the order given. Raises `ValueError`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in USAGE_GROUPS:
            raise ValueError(f"there is no group {name[:40]!r}; there is {', '.join(USAGE_GROUPS)}")
    if len(set(names)) < len(names):
        raise ValueError("a group is there twice")
    return cast("tuple[UsageGroup, ...]", tuple(names))


def as_json(line: UsageLine) -> dict[str, Any]:
    """Money is a string: a float would not be exact. It is null where no row has a price."""
    told: dict[str, Any] = {str(name): value for name, value in line.group.items()}
    price = None if line.price is None else format(line.price, "f")
    return {
        **told,
        **{name: getattr(line, name) for name in _COUNTS},
        "total_tokens": line.prompt_tokens + line.completion_tokens,
        "price": price,
        "currency": line.currency,
    }


def as_csv(groups: Sequence[UsageGroup], lines: Sequence[UsageLine]) -> str:
    """With a line of titles; the groups come first."""
    out = io.StringIO()
    titles = [*groups, *_COUNTS, "total_tokens", "price", "currency"]
    writer = csv.DictWriter(out, titles, lineterminator="\r\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _cell(value) for name, value in as_json(line).items()})
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
