"""What a request's headers wish for: how long it may take, and how important it is."""

from __future__ import annotations

import math

from headrace.errors import InvalidParameter
from headrace.types import PRIORITIES, Priority

TIMEOUT_HEADER = "X-Request-Timeout"
PRIORITY_HEADER = "X-Headrace-Priority"
LONGEST_TIMEOUT = 86_400.0
"""Seconds; the server's own request_timeout is the limit as a rule, but what is longer than a day is a mistake."""


def timeout_of(header: str | None) -> float | None:
    """Seconds; None where nothing was said. Raises `InvalidParameter`."""
    if header is None:
        return None
    try:
        # Python's own float takes more than a number in a header is: `1_0`, `infinity`.
        seconds = float(header) if header.isascii() and "_" not in header else math.nan
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_TIMEOUT:
        raise InvalidParameter(
            f"{TIMEOUT_HEADER} is a number of seconds above 0, at most {LONGEST_TIMEOUT:g}, not {header[:40]!r}.", param=TIMEOUT_HEADER
        )
    return seconds


def priority_of(header: str | None) -> Priority:
    """`default` where nothing was said. Raises `InvalidParameter`."""
    if header is None:
        return "default"
    word = header.strip().lower()
    if word not in PRIORITIES:
        raise InvalidParameter(f"{PRIORITY_HEADER} is one of {', '.join(PRIORITIES)}, not {header[:40]!r}.", param=PRIORITY_HEADER)
    return word
