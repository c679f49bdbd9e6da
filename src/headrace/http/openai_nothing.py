"""OpenAI's fields that this server can't honour, and the values of them that ask for nothing.

This is the one place to look at, and to take a line from, when a field comes to be honoured. A value listed here changes nothing
about the answer; null always is one. Any other value is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from headrace.errors import InvalidParameter, Unsupported

Nothing = Callable[[Any], bool]


def one_of(*values: Any) -> Nothing:
    # `True == 1` in Python, hence the types.
    return lambda value: any(type(value) is type(known) and value == known for known in values)


def label(value: Any) -> bool:
    """A word for the caller's own books."""
    return isinstance(value, str)


def labels(value: Any) -> bool:
    return isinstance(value, dict)


NEVER = one_of()


class Fields:
    """Names of fields, with what asks for nothing in each."""

    __slots__ = ("known", "values")

    def __init__(self, known: Mapping[str, Nothing]) -> None:
        self.known = known
        self.values: Callable[[msgspec.Struct], tuple[Any, ...]] = attrgetter(*known)


CHAT = Fields(
    {
        "audio": NEVER,
        "function_call": one_of("none", "auto"),
        "functions": one_of([]),
        "metadata": labels,
        "modalities": one_of(["text"]),
        "moderation": NEVER,
        "parallel_tool_calls": one_of(True, False),
        "prediction": NEVER,
        "prompt_cache_key": label,
        "prompt_cache_options": NEVER,
        "prompt_cache_retention": one_of("in_memory", "in-memory"),
        "reasoning_effort": one_of("none"),
        "response_format": one_of({"type": "text"}),
        "safety_identifier": label,
        "service_tier": one_of("auto", "default"),
        "store": one_of(False),
        "tool_choice": one_of("none", "auto"),
        "tools": one_of([]),
        "user": label,
        "verbosity": one_of("medium"),
        "web_search_options": NEVER,
    }
)

COMPLETION = Fields(
    {
        "suffix": one_of(""),
        "user": label,
    }
)

MESSAGE = Fields(
    {
        # Parts of OpenAI's own answers, which clients send back as history.
        "annotations": one_of([]),
        "audio": NEVER,
        "function_call": NEVER,
        "refusal": one_of(""),
    }
)

PART = Fields(
    {
        "file": NEVER,
        "image_url": NEVER,
        "input_audio": NEVER,
        "prompt_cache_breakpoint": NEVER,
        "refusal": NEVER,
    }
)

Ignored = msgspec.Raw | msgspec.UnsetType
"""The type of such a field: read past, and looked at only if it is there."""

_LONGEST = 65536
"""Bytes; no value that asks for nothing is longer."""


def refuse_what_we_cannot(struct: msgspec.Struct, fields: Fields, place: str = "") -> None:
    """Raises `Unsupported`, naming the first field that asks for something."""
    values = fields.values(struct)
    if values.count(msgspec.UNSET) == len(values):
        return
    for name, asks_nothing in fields.known.items():
        raw = getattr(struct, name)
        if raw is msgspec.UNSET:
            continue
        field = place + name
        if len(raw) > _LONGEST:
            raise InvalidParameter(f"`{field}` is too long.", param=field)
        value = msgspec.json.decode(raw)
        if value is not None and not asks_nothing(value):
            shown = bytes(raw)[:100].decode("utf-8", "replace")
            raise Unsupported(f"`{field}`: this server can't honour {shown}{'…' if len(raw) > 100 else ''} here.", param=field)
