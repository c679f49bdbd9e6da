"""Shows how far a pull or a conversion is: bars where a person watches, plain log lines otherwise."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger("headrace.models")

Advance = Callable[[int], None]
"""Called with the bytes there are so far, not with what was added."""

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """`show` None: bars if standard error is a terminal."""

    def __init__(self, show: bool | None = None) -> None:
        self._bars = sys.stderr.isatty() if show is None else show

    @contextmanager
    def bytes(self, what: str, total: int | None) -> Iterator[Advance]:
        """A bar over bytes; `total` None where the sender doesn't say."""
        if not self._bars:
            yield _log_lines(what, total)
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Bars(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, completed=done)

    @contextmanager
    def spinner(self, what: str) -> Iterator[None]:
        """For work that doesn't say how far it is."""
        if not self._bars:
            log.info("%s", what)
            begun = time.monotonic()
            yield
            log.info("%s: done in %.0f s", what, time.monotonic() - begun)
            return
        from rich.console import Console

        with Console(stderr=True).status(what + " …"):
            yield


def _log_lines(what: str, total: int | None) -> Advance:
    log.info("%s%s", what, f" ({total / 1e6:.0f} MB)" if total else "")
    next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def advance(done: int) -> None:
        nonlocal next_line
        now = time.monotonic()
        if now >= next_line or done == total:
            next_line = now + _SECONDS_BETWEEN_LINES
            log.info("%s: %s", what, f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB")

    return advance
