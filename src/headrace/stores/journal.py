"""The local journal: where bills go while the database is away. Append-only files, each record with its checksum, synced in groups.

A record is eight bytes, its length and its CRC-32, both little-endian, and one row in MessagePack. A file is read up to its first record
that is cut off: what comes after was never acknowledged to anybody.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from zlib import crc32

import msgspec

from headrace.records import UsageRow

_HEAD = 8
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(UsageRow).decode


class Journal:
    """One API process's journal, in a folder that is there. One thread appends at a time; another may rotate meanwhile."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._descriptor = -1
        self._size = 0
        self._number = 0

    def append(self, rows: Sequence[UsageRow]) -> None:
        """Returns once they are on the disk. Raises `OSError`; then none of them is in the journal."""
        data = b"".join(map(record, rows))
        with self._lock:
            if self._descriptor < 0:
                self._begin()
            try:
                at = 0
                while at < len(data):
                    at += os.write(self._descriptor, data[at:])
                os.fdatasync(self._descriptor)
            except OSError:
                # After a sync that failed nothing is certain of this file but what was synced before.
                self._cut()
                raise
            self._size += len(data)

    def rotate(self) -> list[Path]:
        """The files so far, oldest first; what comes next goes into another."""
        with self._lock:
            self._end()
        return files(self._folder)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _begin(self) -> None:
        self._number += 1
        path = self._folder / f"{self._number:08}.log"
        self._descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _cut(self) -> None:
        try:
            os.ftruncate(self._descriptor, self._size)
        finally:
            self._end()

    def _end(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def record(row: UsageRow) -> bytes:
    payload = _encode(row)
    return len(payload).to_bytes(4, "little") + crc32(payload).to_bytes(4, "little") + payload


def files(folder: Path) -> list[Path]:
    """The folder's journal files, oldest first."""
    return sorted(folder.glob("*.log"))


def read(path: Path) -> Iterator[UsageRow]:
    """The rows of a journal file."""
    data = memoryview(path.read_bytes())
    at = 0
    while at + _HEAD <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        payload = data[at + _HEAD : at + _HEAD + length]
        if not length or len(payload) < length or crc32(payload) != int.from_bytes(data[at + 4 : at + _HEAD], "little"):
            return
        yield _decode(payload)
        at += _HEAD + length
