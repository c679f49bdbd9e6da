"""A key's secret: how it is drawn, how it is recognised, and what is stored instead of it."""

from __future__ import annotations

import hmac
import re
import secrets

PREFIX = "hr-"
SHOWN = len(PREFIX) + 6
"""Characters of a secret that are stored in clear, for people to recognise it; 220 bits stay unknown."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_LENGTH = 43
"""Digits to base 62 that hold 256 bits."""
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


def digest_of(secret: str, pepper: bytes) -> bytes:
    """HMAC-SHA-256 under the server's pepper. A secret has 256 bits, so that no slow hash is needed against guessing."""
    return hmac.digest(pepper, secret.encode("utf-8", "surrogateescape"), "sha256")
