"""Reading a request's body, with limits that keep a hostile one from holding the event loop.

Decoding holds the GIL, in a thread just as here, so what would take long is refused before: see `MOST_COMMAS`.
Nesting needs no check of ours, the decoder gives up at Python's recursion limit, within a millisecond.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from starlette.types import Receive

from headrace.errors import BodyTooLarge
from headrace.http.exchange import Exchange
from headrace.http.hangup import ClientGone
from headrace.http.problems import Fault, InvalidBody

SMALL_BODY = 65536
"""Bytes up to which no body takes long to decode, whatever is in it."""
MOST_COMMAS = 200_000
MOST_COLONS = 100_000
MOST_BRACKETS = 40_000
"""In a body, wherever they are: counting is quick, and decoding this many elements, fields, or lists and objects takes 10 to
20 ms. A text with more of them has more tokens than the contexts of the models that this server is for."""

_LONE_SURROGATE = re.compile(rb"(?i)\\ud[89a-f][0-9a-f]{2}")


async def read_body(exchange: Exchange, receive: Receive, limit: int) -> bytes:
    """The whole body, of at most `limit` bytes, with or without Content-Length.

    Raises `BodyTooLarge`, `InvalidBody` for an empty body or one that says it isn't JSON, `ClientGone`.
    """
    if exchange.content_length is not None and exchange.content_length > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _too_large(limit)
        parts.append(part)
        if not message.get("more_body", False):
            break
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    if not body:
        raise InvalidBody([Fault((), "Field required: the body is empty, send JSON", "missing")])
    if exchange.content_type and b"json" not in exchange.content_type.lower():
        # A browser may send other types to any address without asking first.
        raise InvalidBody([Fault((), "The body must be JSON: send Content-Type: application/json", "json_type")])
    if size > SMALL_BODY and _intricate(body):
        limits = f"{MOST_COMMAS} commas, {MOST_COLONS} colons or {MOST_BRACKETS} opening brackets"
        raise InvalidBody([Fault((), f"The body has too many parts: over {limits}", "too_long")])
    return body


def _intricate(body: bytes) -> bool:
    return (
        body.count(b",") > MOST_COMMAS
        or body.count(b":") > MOST_COLONS
        or body.count(b"[") > MOST_BRACKETS
        or body.count(b"{") > MOST_BRACKETS
    )


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"The body is larger than {limit / 1048576:g} MiB, the most this server takes (max_body_mib).")


def decode_json(body: bytes) -> Any:
    """A body as plain Python values. Raises `InvalidBody`."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise malformed(body, error) from None


def malformed(body: bytes, error: Exception) -> InvalidBody:
    """Why a body isn't JSON. NaN and Infinity are not, and neither are lone surrogates, which no UTF-8 text can hold."""
    if isinstance(error, RecursionError):
        reason = "it is nested too deeply"
    elif isinstance(error, UnicodeDecodeError):
        reason = "it is not UTF-8"
    elif len(body) <= SMALL_BODY and _LONE_SURROGATE.search(body):
        reason = "it holds a lone surrogate, which is no character"
    else:
        reason = str(error)[:200].removeprefix("JSON is malformed: ")
    return InvalidBody([Fault((), f"The body is not valid JSON: {reason}", "json_invalid")])
