"""What else the machine did during a run. Servers whose threads wait for each other lose far more to it than their share."""

from __future__ import annotations

import os
import time

import psutil

QUIET = 0.03
"""Share of the machine that others may use before figures are not to be trusted."""


class OthersWatch:
    """Begun before a run, asked after it, when all of its processes have ended and been waited for."""

    def __init__(self) -> None:
        self._load = os.getloadavg()[0]
        self._began = time.perf_counter()
        self._busy = _busy_seconds()
        self._ours = _our_seconds()

    def share(self) -> float:
        """CPU time of processes that are not ours, over all cores' time; the hypervisor's theft counts as theirs."""
        others = (_busy_seconds() - self._busy) - (_our_seconds() - self._ours)
        return max(0.0, others) / ((time.perf_counter() - self._began) * (psutil.cpu_count() or 1))

    def note(self) -> str:
        share = self.share()
        verdict = "" if share <= QUIET else " **The machine was not quiet: don't trust these figures.**"
        return f"Load average before the run {self._load:.2f}; other processes used {share:.1%} of the machine during it.{verdict}"


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def _our_seconds() -> float:
    return sum(os.times()[:4])
