"""The pass of the operator's own commands: who can read the server's pepper administers it, from the same machine.

It is good for a minute, so that a program that listens at the server's address in its absence, and is sent one, has little of it.
"""

from __future__ import annotations

import hmac
import re

LIFE = 60
"""Seconds."""

_FORM = re.compile(r"hp-(\d{1,12})-([0-9a-f]{64})")


def operator_pass(pepper: bytes, now: float) -> str:
    """`now` is Unix time."""
    made_at = str(int(now))
    return f"hp-{made_at}-{_seal(pepper, made_at)}"


def is_operator(token: str | None, pepper: bytes, now: float) -> bool:
    """Whether `token` is a pass that was made with this pepper a moment ago."""
    found = _FORM.fullmatch(token) if token is not None and pepper else None
    if found is None or abs(now - int(found[1])) > LIFE:
        return False
    return hmac.compare_digest(found[2], _seal(pepper, found[1]))


def _seal(pepper: bytes, made_at: str) -> str:
    return hmac.digest(pepper, b"headrace operator " + made_at.encode(), "sha256").hex()
