"""A key's secret: how it is drawn, how it is recognised, and what is stored instead of it."""

from __future__ import annotations

import re
import secrets
from hashlib import sha256

PREFIX = "hr-"
SHOWN = len(PREFIX) + 6
"""Characters of a secret that are stored in clear, for people to recognise it; 220 bits stay unknown."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LENGTH = 43
"""Digits to base 62 that hold 256 bits."""
_BLOCK = 64
"""Bytes that SHA-256 takes at a time."""
_FORM = re.compile(rf"{PREFIX}[0-9A-Za-z]{{{_LENGTH}}}")


def new_secret() -> str:
    """256 bits from the system's generator, in characters that a double click selects."""
    number = secrets.randbits(256)
    digits = ""
    for _ in range(_LENGTH):
        number, digit = divmod(number, len(_DIGITS))
        digits += _DIGITS[digit]
    return PREFIX + digits


def looks_like_secret(token: str) -> bool:
    """Whether it can be one of ours; what can't needs no look-up."""
    return _FORM.fullmatch(token) is not None


class Digest:
    """HMAC-SHA-256 (RFC 2104) under the server's pepper. The pepper's two halves are hashed once: the library does that for each secret
    anew, and takes longer for it than for all the rest. A secret has 256 bits, so that no slow hash is needed against guessing."""

    def __init__(self, pepper: bytes) -> None:
        key = (pepper if len(pepper) <= _BLOCK else sha256(pepper).digest()).ljust(_BLOCK, b"\0")
        self._inner = sha256(bytes(byte ^ 0x36 for byte in key))
        self._outer = sha256(bytes(byte ^ 0x5C for byte in key))

    def __call__(self, secret: str) -> bytes:
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(secret.encode("utf-8", "surrogateescape"))
        outer.update(inner.digest())
        return outer.digest()


def digest_of(secret: str, pepper: bytes) -> bytes:
    """What is stored of a secret."""
    return Digest(pepper)(secret)
