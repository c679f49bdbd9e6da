"""Server-sent events, read as they come off the wire."""

from __future__ import annotations


class EventReader:
    """Splits a byte stream into events.

    Works on bytes: `str.splitlines`, and with it most line iterators, would also break a JSON string at U+2028.
    """

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """(event name, data) of the events that `data` completes; comments and empty events are left out."""
        text = self._rest + data if self._rest else data
        if b"\r\n" in text:
            text = text.replace(b"\r\n", b"\n")
        *blocks, self._rest = text.split(b"\n\n")
        found: list[tuple[bytes, bytes]] = []
        for block in blocks:
            if block.startswith(b"data: ") and b"\n" not in block:  # nearly all of them
                found.append((b"", block[6:]))
                continue
            name, lines = b"", []
            for line in block.split(b"\n"):
                field, _, value = line.partition(b":")
                value = value.removeprefix(b" ")
                if field == b"data":
                    lines.append(value)
                elif field == b"event":
                    name = value
            if lines:
                found.append((name, b"\n".join(lines)))
        return found
