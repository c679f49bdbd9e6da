"""Reads a GGUF file's metadata.

The `gguf` package wraps every element of an array in an object of its own, three seconds for a vocabulary of
49,152; this reader takes the arrays whole, and refuses counts that the file is too short to hold.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.errors import ModelError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9
_MOST_KEYS = 1 << 16
_MOST_DIMENSIONS = 4
"""Of a tensor; ggml's GGML_MAX_DIMS."""


def read_metadata(path: Path) -> dict[str, Any]:
    """Key-value pairs of a GGUF file, versions 2 and 3, little-endian; strings are str with U+FFFD for bad bytes.

    Raises `ModelError` where it is no GGUF file, or a damaged one.
    """
    with _reading(path) as reader:
        return reader.pairs()


def check_whole(path: Path) -> None:
    """Raises `ModelError` where the file ends before its tensors do, as a broken download does; OpenVINO's reader crashes on it."""
    with _reading(path) as reader:
        wanted = reader.tensors_end(reader.pairs())
    has = path.stat().st_size
    if has < wanted:
        raise ModelError(f"{path} is cut short: it has {has:,} of {wanted:,} bytes. Fetch it again.")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[_Reader]:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (it doesn't begin with the letters GGUF).")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                yield _Reader(data)
            except (struct.error, IndexError, OverflowError) as error:
                raise ModelError(f"{path} is damaged or cut short ({error}). Fetch it again.") from None
            except _BadGguf as error:
                raise ModelError(f"{path} can't be read: {error}. Fetch it again, or another conversion of the model.") from None


class _BadGguf(Exception):
    pass


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 4
        self._tensors = 0

    def pairs(self) -> dict[str, Any]:
        version = self._scalar("I")
        if version not in (2, 3):
            raise _BadGguf(f"version {version} is not 2 or 3 (little-endian)")
        self._tensors = self._scalar("Q")
        count = self._scalar("Q")
        if count > _MOST_KEYS:
            raise _BadGguf(f"it claims {count} metadata keys")
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            found[key] = self._value(self._scalar("I"))
        return found

    def tensors_end(self, pairs: dict[str, Any]) -> int:
        """The byte after the last tensor; reads on where `pairs` ended."""
        from gguf.constants import GGML_QUANT_SIZES

        last = 0
        for _ in range(self._tensors):
            self._string()
            if (dimensions := self._scalar("I")) > _MOST_DIMENSIONS:
                raise _BadGguf(f"a tensor of {dimensions:,} dimensions")
            values = math.prod([self._scalar("Q") for _ in range(dimensions)])
            block, size = GGML_QUANT_SIZES.get(self._scalar("I"), (1, 0))
            last = max(last, self._scalar("Q") + values // block * size)
        alignment = pairs.get("general.alignment")
        if not isinstance(alignment, int) or alignment <= 0:
            alignment = 32
        return -(-self._at // alignment) * alignment + last if last else self._at

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        end = self._at + length
        if end > self._size:
            raise _BadGguf("a string reaches beyond the end of the file")
        raw = self._data[self._at : end]
        self._at = end
        return raw.decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise _BadGguf(f"unknown value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self._scalar("I")
        count = self._scalar("Q")
        if kind == _ARRAY:
            raise _BadGguf("arrays of arrays are not used by any model")
        if kind == _STRING:
            if count * 8 > self._size - self._at:
                raise _BadGguf("an array reaches beyond the end of the file")
            return [self._string() for _ in range(count)]
        if kind not in _SCALARS:
            raise _BadGguf(f"unknown value type {kind}")
        code = _SCALARS[kind]
        size = struct.calcsize("<" + code) * count
        if size > self._size - self._at:
            raise _BadGguf("an array reaches beyond the end of the file")
        values = list(struct.unpack_from(f"<{count}{code}", self._data, self._at))
        self._at += size
        return values
