"""Prompts that were encoded a moment ago: the same question again is neither templated nor tokenized again."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

LIFETIME = 10.0
"""Seconds. Templates may write the date, which must not stay for long when it is over."""
MOST_CHARACTERS = 4_000_000
LARGEST = 100_000
"""Characters of a prompt that is remembered."""


@dataclass(slots=True)
class _Entry:
    tokens: tuple[int, ...]
    size: int
    until: float


class PromptMemo:
    """The last few prompts' token ids. Keys hold the tenant: nobody finds out by the clock what others have asked."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> list[int] | None:
        try:
            entry = self._entries.get(key)
        except TypeError:
            return None  # tool calls are dictionaries, which have no hash
        if entry is None:
            return None
        if entry.until < self._clock():
            self._drop(key)
            return None
        return list(entry.tokens)

    def put(self, key: Hashable, size: int, tokens: list[int]) -> None:
        """`size` is in characters."""
        size += len(tokens)
        if size > LARGEST:
            return
        try:
            if key in self._entries:
                self._drop(key)
        except TypeError:
            return
        self._entries[key] = _Entry(tuple(tokens), size, self._clock() + LIFETIME)
        self._size += size
        while self._size > MOST_CHARACTERS:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: Hashable) -> None:
        self._size -= self._entries.pop(key).size
