"""A process that gives way to others while it loads, and then doesn't any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

NICENESS = 5
_CAP_SYS_NICE = 23
_AUTOGROUP = Path("/proc/self/autogroup")


def give_way() -> Callable[[], None]:
    """Let others have the processors first; what comes back undoes it, for all threads that there are by then.

    Call it before there are threads. Most systems let a process lower its priority and not raise it again: there, it stays as it is.
    """
    if sys.platform != "linux":
        return lambda: None
    undo: list[Callable[[], None]] = []
    before = os.getpriority(os.PRIO_PROCESS, 0)
    if _may_return_to(before):
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before + NICENESS)
            gave_way = os.getpriority(os.PRIO_PROCESS, 0)  # there is a lowest one
            undo.append(lambda: _all_threads(before, gave_way=gave_way))
    # Where sessions are grouped, niceness counts only within a group; a child's session is a group of its own.
    with contextlib.suppress(OSError, ValueError, IndexError):
        nice = int(_AUTOGROUP.read_text().rpartition(" ")[2])
        if nice >= 0:
            _AUTOGROUP.write_text(str(min(nice + NICENESS, 19)))
            undo.append(lambda: _regroup(nice))

    def restore() -> None:
        while undo:
            undo.pop()()

    return restore


def _may_return_to(niceness: int) -> bool:
    import resource

    allowed, _ = resource.getrlimit(resource.RLIMIT_NICE)
    if 20 - niceness <= allowed:
        return True
    try:
        status = Path("/proc/self/status").read_text()
        capabilities = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:"))
    except (OSError, StopIteration, ValueError):
        return False
    return bool(capabilities >> _CAP_SYS_NICE & 1)


def _all_threads(niceness: int, *, gave_way: int) -> None:
    """Those that gave way with the process; one that lowered itself further stays there."""
    # Two rounds: a thread may be started while the first goes on, by one that is still to come.
    for _ in range(2):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                if os.getpriority(os.PRIO_PROCESS, int(thread.name)) == gave_way:
                    os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def _regroup(niceness: int) -> None:
    with contextlib.suppress(OSError):
        _AUTOGROUP.write_text(str(niceness))
