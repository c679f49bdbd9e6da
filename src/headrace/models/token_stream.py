"""Incremental detokenization over a table of each token's bytes: exact for any way tokens cut UTF-8."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from headrace.ports import TokenStream

_new_decoder = codecs.getincrementaldecoder("utf-8")


class TokenBytes:
    """Each token's bytes, and, where they are whole characters, its text, ready to be emitted.

    `silent` tokens (control tokens) emit nothing; an id without a token neither.
    """

    def __init__(self, table: Sequence[bytes | None], silent: frozenset[int]) -> None:
        self.table = table
        self.emitted: list[bytes] = [b"" if raw is None or token in silent else raw for token, raw in enumerate(table)]
        self.texts: list[str | None] = [_whole(raw) for raw in self.emitted]

    def stream(self) -> TokenStream:
        return ByteStream(self)


def _whole(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


class ByteStream:
    """One sequence's detokenizer. Emits a character with the token that completes it."""

    __slots__ = ("_bytes", "_decoder", "_pending", "_texts")

    def __init__(self, tokens: TokenBytes) -> None:
        self._texts = tokens.texts
        self._bytes = tokens.emitted
        self._decoder: codecs.IncrementalDecoder | None = None
        self._pending = False

    def push(self, token: int) -> str:
        # A model's output may be wider than its vocabulary; such an id has no text.
        if not 0 <= token < len(self._texts):
            return ""
        if not self._pending:
            text = self._texts[token]
            if text is not None:
                return text
        if self._decoder is None:
            self._decoder = _new_decoder("replace")
        text = self._decoder.decode(self._bytes[token])
        self._pending = self._decoder.getstate()[0] != b""
        return text

    def flush(self) -> str:
        if not self._pending or self._decoder is None:
            return ""
        self._pending = False
        return self._decoder.decode(b"", final=True)
