"""What sources of events have in common that stand before another one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Self

from headrace.ports import TakesBatch, hands_over
from headrace.types import Event


class Relay:
    """`_next` reads the next batch; `ports.HandsOver` where the `_source` behind it is, once there is one."""

    __slots__ = ("_next", "_source")

    _source: AsyncIterator[list[Event]] | None
    _next: Callable[[], Awaitable[list[Event]]]

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[list[Event]]:
        return self._next()

    def hand_to(self, take: TakesBatch) -> None:
        if hands_over(self._source):
            self._source.hand_to(take)

    def stop(self, error: Exception | None = None) -> None:
        if hands_over(self._source):
            self._source.stop(error)
