"""Counters that survive the death of any process: a small file that an API process makes and engine workers write to.

One slot is four aligned words of eight bytes: two for a digest of the request's id, one for the prompt's tokens (cached ones in its
upper half), one for the tokens of completion, whose top bit says that nothing more comes. A word is written by one store to memory that
the kernel owns, so that a killed process leaves the old number or the new one, and no process has to do anything for it to be there.

Who uses the file holds a shared lock on it, which ends with the process; whoever gets the exclusive lock knows that its numbers are final.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from headrace.errors import Overloaded
from headrace.types import Report

CAPACITY = 16384
"""Requests of one API process that run, or wait to be settled, at a time."""
_WORDS = 4
_SLOT = 8 * _WORDS
_MAGIC = int.from_bytes(b"hrslots1", "little")
"""In the first word of slot 0, which counts nothing."""
_ENDED = 1 << 63
_HALF = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Counts:
    """What a slot says: tokens."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    ended: bool = False


class _Mapped:
    """The file in memory, as words."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, 0)
        self._bytes = memoryview(self._map)
        self.words = self._bytes.cast("Q")

    def close(self) -> None:
        """Unmap it and let go of the lock. Idempotent."""
        if self._descriptor >= 0:
            self.words.release()
            self._bytes.release()
            self._map.close()
            os.close(self._descriptor)
            self._descriptor = -1


def _counts(words: memoryview[int], slot: int) -> Counts:
    at = slot * _WORDS
    prompt, completion = words[at + 2], words[at + 3]
    return Counts(prompt & _HALF, prompt >> 32, completion & ~_ENDED, completion >= _ENDED)


def _digest(request_id: str) -> tuple[int, int]:
    digest = blake2b(request_id.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") or 1


class SlotFile:
    """An API process's slots. Every byte of the file is written at first, so that a full disk shows now and not under the engine's pen."""

    def __init__(self, path: Path, capacity: int = CAPACITY) -> None:
        """Raises `OSError`."""
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            data = _MAGIC.to_bytes(8, "little").ljust((capacity + 1) * _SLOT, b"\0")
            while data:
                data = data[os.write(descriptor, data) :]
            self._mapped = _Mapped(descriptor)
        except OSError:
            os.close(descriptor)
            raise
        self._words = self._mapped.words
        self._capacity = capacity
        self._unused = 1
        self._free: list[int] = []

    def take(self, request_id: str) -> int:
        """A slot with all counts at zero. Raises `Overloaded` when there is none left."""
        if self._free:
            slot = self._free.pop()
        elif self._unused <= self._capacity:
            slot = self._unused
            self._unused += 1
        else:
            raise Overloaded(f"{self._capacity} requests run or wait for their bill; that is the most.", retry_after=1)
        words, at = self._words, slot * _WORDS
        words[at + 2] = words[at + 3] = 0
        words[at], words[at + 1] = _digest(request_id)
        return slot

    def free(self, slot: int) -> None:
        at = slot * _WORDS
        self._words[at] = self._words[at + 1] = 0
        self._free.append(slot)

    def read(self, slot: int) -> Counts:
        return _counts(self._words, slot)

    def rewind(self, slot: int, completion: int) -> None:
        """Forget what was counted beyond `completion` tokens."""
        at = slot * _WORDS
        if not completion:
            self._words[at + 2] = 0
        self._words[at + 3] = completion

    def close(self) -> None:
        self._mapped.close()


class SlotCounter:
    """`ports.Counter` in a slot."""

    __slots__ = ("_at", "_base", "_total", "_words")

    def __init__(self, words: memoryview[int], slot: int) -> None:
        self._words = words
        self._at = slot * _WORDS
        self._base = self._total = words[self._at + 3] & ~_ENDED
        """What an engine before us has counted for the request."""
        words[self._at + 3] = self._base

    def prompt(self, tokens: int, cached: int) -> None:
        if not self._base:
            self._words[self._at + 2] = tokens | cached << 32

    def add(self, tokens: int) -> None:
        self._total += tokens
        self._words[self._at + 3] = self._total

    def end(self, report: Report | None) -> None:
        if report is not None:
            self.prompt(report.prompt_tokens, report.cached_tokens)
            self._total = self._base + report.completion_tokens
        self._words[self._at + 3] = self._total | _ENDED


class SharedSlots:
    """`ports.Counters`: an API process's slots, as an engine worker writes to them."""

    def __init__(self, path: str) -> None:
        """Raises `OSError`, also where its API process has died and is recovered, and `ValueError` for a file that isn't one."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if not os.path.samestat(Path(path).stat(), os.fstat(descriptor)):
                raise FileNotFoundError(f"{path} is another file now")
            self._mapped = _Mapped(descriptor)
        except (OSError, ValueError):
            os.close(descriptor)
            raise
        if self._mapped.words[0] != _MAGIC:
            self._mapped.close()
            raise ValueError(f"{path} holds no counters")

    def counter(self, slot: int) -> SlotCounter:
        if not 0 < slot < len(self._mapped.words) // _WORDS:
            raise ValueError(f"There is no slot {slot}.")
        return SlotCounter(self._mapped.words, slot)

    def close(self) -> None:
        self._mapped.close()


class LeftSlots:
    """The slots that a dead API process left, once every worker is done with them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._by_digest: dict[tuple[int, int], Counts] = {}
        if os.fstat(descriptor).st_size >= _SLOT:
            with contextlib.closing(_Mapped(os.dup(descriptor))) as mapped:
                words = mapped.words
                if words[0] == _MAGIC:
                    for slot in range(1, len(words) // _WORDS):
                        at = slot * _WORDS
                        if words[at + 1]:
                            self._by_digest[words[at], words[at + 1]] = _counts(words, slot)

    @classmethod
    def claim(cls, path: Path) -> LeftSlots | None:
        """None while somebody uses them, here or in another process that recovers. Raises `OSError`."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return cls(descriptor)

    def counts(self, request_id: str) -> Counts:
        """Nothing, for a request that no engine was asked for."""
        return self._by_digest.get(_digest(request_id), Counts())

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._descriptor)
