"""Which bytes each token stands for, for the two kinds of vocabularies there are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headrace.errors import ModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def is_byte_level(described: dict[str, Any]) -> bool:
    return "ByteLevel" in _decoders(described.get("decoder"))


def byte_table(described: dict[str, Any], vocabulary: Mapping[str, int], added: Mapping[int, str]) -> list[bytes | None]:
    """Bytes by token id; None where the vocabulary has a hole. Raises `ModelError` for decoders of other kinds."""
    decoders = _decoders(described.get("decoder"))
    if "ByteLevel" in decoders:
        as_bytes = _from_byte_level
    elif decoders & {"ByteFallback", "Metaspace", "Replace"}:
        as_bytes = _from_sentencepiece
    else:
        raise ModelError(
            f"The model's tokenizer joins tokens by {', '.join(sorted(decoders)) or 'nothing'}; only byte-level and "
            "SentencePiece tokenizers can be served. Language models for text generation have one of these; is it one?"
        )
    table: list[bytes | None] = [None] * (max(max(vocabulary.values(), default=-1), max(added, default=-1)) + 1)
    for token, index in vocabulary.items():
        table[index] = as_bytes(token)
    for index, content in added.items():
        table[index] = content.encode() if "ByteLevel" in decoders else content.replace("▁", " ").encode()
    return table


def _decoders(step: dict[str, Any] | None) -> set[str]:
    if step is None:
        return set()
    if step["type"] == "Sequence":
        return {kind for part in step["decoders"] for kind in _decoders(part)}
    return {step["type"]}


def _visible_bytes() -> dict[int, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and on (openai/gpt-2, encoder.py)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: byte for byte in visible} | {0x100 + index: byte for index, byte in enumerate(hidden)}


_ALPHABET = _visible_bytes()


def _from_byte_level(token: str) -> bytes:
    # A character beyond the alphabet means that the token was added as plain text.
    return bytes([_ALPHABET[ord(c)] for c in token]) if _ALPHABET.keys() >= set(map(ord, token)) else token.encode("utf-8", "replace")


def _from_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8", "replace")
