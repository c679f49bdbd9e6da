"""What a call has entered on its journey, and leaves in reverse.

`contextlib` has both parts; these do only what steps need of them, for a tenth of the time, which counts where a request goes through ten
steps.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import Any, ParamSpec

P = ParamSpec("P")

_Leave = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], Awaitable[bool | None]]


class Before:
    """A step that does something before the call goes on, and nothing when it is over."""

    __slots__ = ("_work",)

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self._work = work

    def __aenter__(self) -> Coroutine[Any, Any, None]:
        return self._work

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass


def before(work: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, Before]:
    """Makes a step of a coroutine function, as `asynccontextmanager` does of a generator that yields at its end."""

    def step(*args: P.args, **kwargs: P.kwargs) -> Before:
        return Before(work(*args, **kwargs))

    step.__doc__ = work.__doc__
    return step


class Unwinding:
    """Leaves what was entered, the last first, when it is left itself; each is told the error there is then."""

    __slots__ = ("_entered",)

    def __init__(self) -> None:
        self._entered: list[_Leave] = []

    async def enter(self, manager: AbstractAsyncContextManager[None]) -> None:
        """Raises what entering raises; then there is nothing to leave."""
        await manager.__aenter__()
        if type(manager) is not Before:
            self._entered.append(manager.__aexit__)

    def close(self, source: object) -> None:
        """Close an iterator in the end, if it has an `aclose`."""
        if hasattr(source, "aclose"):
            self._entered.append(_Closing(source.aclose))

    def take_over(self, other: Unwinding) -> None:
        """From now on what `other` has entered is left with this one."""
        self._entered += other._entered
        other._entered = []

    async def __aenter__(self) -> Unwinding:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool | None:
        came = error
        entered = self._entered
        try:
            while entered:
                try:
                    if await entered.pop()(kind, error, trace):
                        kind = error = trace = None
                except BaseException as raised:  # noqa: BLE001 - the others are left, too; then it is raised
                    kind, error, trace = type(raised), raised, raised.__traceback__
            if error is not None and error is not came:
                raise error
            return error is not came
        finally:
            # An error's traceback leads here: no cycle of them.
            del error, came


class _Closing:
    __slots__ = ("_close",)

    def __init__(self, close: Callable[[], Awaitable[None]]) -> None:
        self._close = close

    async def __call__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._close()
