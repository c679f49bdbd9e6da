"""Tokens that stand for structure, not text: what a chat template may write and a user may not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

_WINDOW = 1 << 16
"""Characters searched at a time: between windows other threads get the GIL."""


@dataclass(frozen=True, slots=True)
class ControlToken:
    """`lstrip` and `rstrip`: it takes the white space beside it along, as tokenizer.json says."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class ControlSearch:
    """Finds control tokens' names in a text, the longest where several begin."""

    def __init__(self, controls: Mapping[str, ControlToken]) -> None:
        self.controls = controls
        names = sorted(controls, key=lambda name: (-len(name), name))
        self._reach = max(map(len, names), default=0)
        # Grouped by first character: the engine then skips to one of these instead of trying every name everywhere.
        self._match = re.compile(_by_first(names)) if names else None
        self._begin = re.compile(_by_first(names, "(?=", ")")) if names else None

    def matches(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Non-overlapping (start, end, name), from left to right."""
        if self._match is None:
            return
        after = 0
        for window in range(0, len(text), _WINDOW):
            end = window + _WINDOW
            for found in self._match.finditer(text, max(window, after), min(len(text), end + self._reach)):
                if found.start() >= end:
                    break
                if found.start() >= after:
                    after = found.end()
                    yield found.start(), after, found.group()

    def broken(self, text: str, sentinel: str) -> str:
        """The text with the sentinel put into every control token's name, also into those that overlap.

        A name of one character can't be broken up; it is replaced by the sentinel.
        """
        if self._begin is None:
            return text
        starts = list(dict.fromkeys(self._starts(text)))
        if not starts:
            return text
        parts: list[str] = []
        last = 0
        for start in starts:
            parts += (text[last:start], "" if text[start] in self.controls else text[start], sentinel)
            last = start + 1
        parts.append(text[last:])
        return "".join(parts)

    def _starts(self, text: str) -> Iterable[int]:
        assert self._begin is not None
        for window in range(0, len(text), _WINDOW):
            end = window + _WINDOW
            for found in self._begin.finditer(text, window, min(len(text), end + self._reach)):
                if found.start() < end:
                    yield found.start()


def _by_first(names: list[str], before: str = "(?:", after: str = ")") -> str:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name[0], []).append(re.escape(name[1:]))
    return "|".join(f"{re.escape(first)}{before}{'|'.join(rests)}{after}" for first, rests in groups.items())
