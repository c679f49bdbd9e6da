"""Who took part in the step that an engine died of: a page of memory in a file, which outlives the process that wrote it.

Beside the worker's socket, one file a process. Only requests that the engine has made no token for are noted: whoever gets on
between deaths is not to blame for them. Requests are noted by a digest of their id, with the tokens that the step computes of them: whoever
was further than at the death before has got on, too.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

_MAGIC = int.from_bytes(b"hrnotes1", "little")
_WORDS = 2048
_MAGIC_AT, _ALONE, _COUNT, _FIRST = range(4)
_KEPT = 16
"""Files of dead processes that are left for who may yet read them."""


def notes_path(socket_path: str, pid: int) -> Path:
    """Where the worker behind that socket notes its steps."""
    return Path(f"{socket_path}.steps-{pid}")


@dataclass(frozen=True, slots=True)
class LastStep:
    """What a dead worker had noted."""

    members: dict[int, tuple[int, int]]
    """With how many tokens of each were computed before the step, and would have been after it; (0, 0) where that isn't known."""
    alone_: int

    def took_part(self, request_id: str) -> bool:
        return digest(request_id) in self.members

    def span(self, request_id: str) -> tuple[int, int]:
        return self.members.get(digest(request_id), (0, 0))

    def alone(self, request_id: str) -> bool:
        """Whether the engine was this request's alone."""
        return digest(request_id) == self.alone_


def digest(request_id: str) -> int:
    """An id's number, never 0. What follows a tilde doesn't count: a worker adds it to an id that it has twice."""
    return int.from_bytes(blake2b(request_id.partition("~")[0].encode(errors="surrogatepass"), digest_size=8).digest(), "little") or 1


class NotedSteps:
    """`ports.StepNotes` in a file. `step` and `alone` are each called from one thread."""

    def __init__(self, path: Path) -> None:
        """Makes the file. Raises `OSError`."""
        descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            # Every byte is written at first, so that a full disk shows now and not under the engine's pen.
            os.write(descriptor, _MAGIC.to_bytes(8, "little").ljust(8 * _WORDS, b"\0"))
            self._map = mmap.mmap(descriptor, 8 * _WORDS)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._map).cast("Q")

    def step(self, request_ids: Sequence[str], spans: Sequence[tuple[int, int]] = ()) -> None:
        words = self._words
        count = min(len(request_ids), (_WORDS - _FIRST) // 2)
        for number in range(count):
            begin, end = spans[number] if spans else (0, 0)
            words[_FIRST + 2 * number] = digest(request_ids[number])
            words[_FIRST + 2 * number + 1] = begin << 32 | end
        words[_COUNT] = count

    def alone(self, request_id: str) -> None:
        self._words[_ALONE] = digest(request_id) if request_id else 0


def read_last_step(path: Path) -> LastStep | None:
    """None where there is nothing to read."""
    try:
        words = memoryview(path.read_bytes()).cast("Q")
    except (OSError, TypeError):
        return None
    if len(words) != _WORDS or words[_MAGIC_AT] != _MAGIC:
        return None
    noted = words[_FIRST : _FIRST + 2 * min(words[_COUNT], (_WORDS - _FIRST) // 2)].tolist()
    members = {name: (span >> 32, span & 0xFFFFFFFF) for name, span in zip(noted[::2], noted[1::2], strict=True)}
    return LastStep(members, words[_ALONE])


def begin_notes(socket_path: str) -> NotedSteps:
    """This process's notes; the oldest of dead ones are removed. Raises `OSError`."""
    notes = NotedSteps(notes_path(socket_path, os.getpid()))
    left = []
    for path in Path(socket_path).parent.glob(f"{Path(socket_path).name}.steps-*"):
        pid = path.name.rpartition("-")[2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            try:
                left.append((path.stat().st_ctime, path))
            except OSError:
                continue  # another worker was faster
    for _, path in sorted(left)[:-_KEPT]:
        path.unlink(missing_ok=True)
    return notes
