"""Server-sent events: text that any parser of the standard reads back exactly.

Source: the HTML standard, section 9.2.6. Lines end at LF, CR or CRLF and nowhere else; one space after the colon is dropped.
"""

from __future__ import annotations

import msgspec

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def json_text(text: str) -> bytes:
    """A JSON string. What careless clients take for a line's end is escaped, though only CR and LF are."""
    encoded = _encode(text)
    if not text.isascii():
        encoded = encoded.replace(b"\xe2\x80\xa8", b"\\u2028").replace(b"\xe2\x80\xa9", b"\\u2029").replace(b"\xc2\x85", b"\\u0085")
    return encoded


def data_event(data: bytes) -> bytes:
    """An unnamed event; `data` is one line."""
    return b"data: " + data + b"\n\n"


def named_event(name: bytes, data: bytes) -> bytes:
    return b"event: " + name + b"\ndata: " + data + b"\n\n"


def comment(text: str) -> bytes:
    return f": {text}\n\n".encode()


class TextEvents:
    """Pieces of text as events. SSE can't carry a carriage return: CR and CRLF become LF, also when the pair is cut in two."""

    __slots__ = ("_after_return",)

    def __init__(self) -> None:
        self._after_return = False

    def event(self, text: str) -> bytes:
        """The event for a piece, empty if nothing is left of it."""
        if self._after_return and text:
            self._after_return = False
            if text[0] == "\n":
                text = text[1:]
        if "\r" in text:
            self._after_return = text[-1] == "\r"
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text:
            return b""
        if "\n" in text:
            text = text.replace("\n", "\ndata: ")
        return b"data: " + text.encode() + b"\n\n"
