"""The pulse of an engine: a few numbers in a file that it shares with its supervisor, which sees by them that it gets on.

Writing them takes no system call and nobody's cooperation, and reading them doesn't ask the engine anything: a process that is
stopped, hangs or is dead just leaves them as they were. None of them is a time; whoever watches uses a clock of its own.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import NamedTuple

_BEATS, _STEPS, _BUSY, _TOKENS, _EXPECTED = range(5)
_SIZE = 8 * 5
_MICROSECONDS = 1e6


class Reading(NamedTuple):
    """What a pulse shows at a glance."""

    beats: int
    """Turns of the process's event loop; it grows several times a second, also without any work."""
    steps: int
    """It grows with each step that begins and each that ends."""
    busy: bool
    """There is work for the step loop."""
    tokens: int
    """Completion tokens since the process was ready."""
    expected: float
    """Seconds that the step under way was expected to take."""


class Pulse:
    """Both sides of it: the engine's process writes, its supervisor reads. Each number is written by one thread, whole."""

    def __init__(self, memory: mmap.mmap | bytearray | None = None) -> None:
        """Without a shared memory it is one that nobody watches."""
        self._numbers = memoryview(memory if memory is not None else bytearray(_SIZE)).cast("Q")

    @classmethod
    def create(cls, path: Path) -> Pulse:
        """A new file, for the two processes of this user. Raises `OSError`."""
        return cls._map(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), new=True)

    @classmethod
    def join(cls, path: Path | str) -> Pulse:
        """The file that another process has made. Raises `OSError`."""
        return cls._map(os.open(path, os.O_RDWR))

    @classmethod
    def _map(cls, fd: int, *, new: bool = False) -> Pulse:
        try:
            if new:
                # Written, not just made long: on a full disk this fails, where touching a page that isn't there would end the process.
                os.write(fd, bytes(_SIZE))
            return cls(mmap.mmap(fd, _SIZE))
        finally:
            os.close(fd)

    # The event loop's side

    def beat(self) -> None:
        """The event loop turns."""
        self._numbers[_BEATS] += 1

    def want(self) -> None:
        """There is something to do for the step loop."""
        self._numbers[_BUSY] = 1

    # The step loop's side

    def begin(self, seconds: float) -> None:
        """The model begins to compute, and is expected to take so many seconds."""
        numbers = self._numbers
        numbers[_EXPECTED] = int(min(max(seconds, 0.0), 1e9) * _MICROSECONDS)
        numbers[_BUSY] = 1
        numbers[_STEPS] += 1

    def end(self, tokens: int) -> None:
        """The step loop has turned; so many completion tokens were made up to now."""
        numbers = self._numbers
        numbers[_EXPECTED] = 0
        numbers[_TOKENS] = tokens
        numbers[_STEPS] += 1

    def rest(self) -> None:
        """The step loop has nothing to do."""
        self._numbers[_BUSY] = 0

    # The supervisor's side

    def read(self) -> Reading:
        beats, steps, busy, tokens, expected = self._numbers
        return Reading(beats, steps, bool(busy), tokens, expected / _MICROSECONDS)
