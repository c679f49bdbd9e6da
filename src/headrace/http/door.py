"""Refuses at the door, while a model is overloaded, who sends what was just refused.

Under overload most requests are refused. Where the engine keeps all processors busy each refusal takes time from those that were let in:
half a millisecond where it goes the way of every request, a fraction of that here. A request that was refused for the engine's queue is
noted with its head. Whoever sends the very same head from the same address within `NOTED` seconds is the same caller with the same rights
and wishes, and as long as the queue would refuse a request of that size, theirs are refused before even the head is parsed. Of the body
only the size is looked at: what is wrong with it is told when there is room.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import Scope

from headrace.call import Call
from headrace.errors import HeadraceError, NotAdmitted, QueueShareFull
from headrace.http.exchange import Exchange
from headrace.http.problems import problem_answer
from headrace.http.serving import Control
from headrace.policies.admit import Crowds, least_tokens
from headrace.policies.cache import wanted
from headrace.waiting import Newcomer, Queue, foreseen

NOTED = 0.5
"""Seconds; a key that is revoked is refused within a second."""
MOST_NOTED = 1000
LONGEST_HEAD = 4096

_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ?([0-9]{1,9})\r\n")
_MAY_BE_KEPT = (b'"temperature"', b'"seed"', b'"cache"')
"""Where none of them is in a body, the response cache has no answer unless the header asks for it."""
_UNLIKE_OTHERS = frozenset(
    {b"upgrade", b"expect", b"transfer-encoding", b"x-client-request-id", b"x-request-timeout", b"x-headrace-priority"}
)
"""Headers that make an answer, or what it depends on, a special one."""

Key = tuple[str, bytes]


@dataclass(slots=True)
class _Noted:
    """A request that was refused, and how those like it are."""

    exchange: Exchange
    call: Call
    until: float
    any_body: bool
    """The cache may have no answer, whatever is in the body."""
    said: list[tuple[bytes, bytes]]
    """By the journey, in headers of the answer."""
    tokens: int
    """The least that its prompt had."""
    queue: Queue | None = None
    """The one that `head` and `body` go by, which refuses"""
    refused: int = 0
    """so many tokens, and so any more."""
    head: bytes = b""
    body: bytes = b""


class Door:
    """`close` is told of every request that was refused here, as of all others."""

    close: Callable[[Exchange], None]

    def __init__(self, crowds: Crowds, control: Control, *, keeps_answers: bool) -> None:
        self._crowds = crowds
        self._control = control
        self._keeps_answers = keeps_answers
        self._noted: dict[Key, _Noted] = {}

    def key_of(self, address: str, data: bytes) -> tuple[Key, int] | None:
        """Of a whole request that was received in one piece, while the model is crowded, and its body's size; else None."""
        if self._crowds.of(None) is None:
            if self._noted:
                self._noted.clear()
            return None
        end = data.find(b"\r\n\r\n", 0, LONGEST_HEAD)
        if end < 0:
            return None
        length = _LENGTH.search(data, 0, end + 2)
        if length is None or len(data) - end - 4 != int(length[1]):
            return None
        return (address, data[: length.start()] + data[length.end() : end]), int(length[1])

    def refusal(self, key: Key, data: bytes, size: int) -> tuple[Exchange, bytes, bytes] | None:
        """What the edge is to be told, and the answer: its head, but for what all answers have, and its body. None if the request has to go
        the way of every request. `size`: of the body."""
        noted = self._noted.get(key)
        if noted is None:
            return None
        crowd = self._crowds.of(None)
        control = self._control
        if crowd is None or time.monotonic() > noted.until or control.leaving or control.refusing:
            del self._noted[key]
            return None
        if not noted.any_body and any(word in data for word in _MAY_BE_KEPT):
            return None
        tokens = min(noted.tokens, max(1, size // 4))
        if noted.queue is not crowd[0] or tokens < noted.refused:
            call = noted.call
            refused = foreseen(*crowd, Newcomer(call.tenant, call.priority, tokens))
            if refused is None:
                return None
            noted.queue, noted.refused = crowd[0], tokens
            noted.head, noted.body = _answer(refused, noted.said, openai=noted.exchange.openai)
            noted.exchange.status = refused.status
            noted.exchange.error = call.outcome.error = refused
        was = noted.exchange
        exchange = Exchange(
            id="req_" + os.urandom(16).hex(),
            method=was.method,
            address=was.address,
            forwarded=was.forwarded,
            openai=was.openai,
            route=was.route,
            status=was.status,
            caller=was.caller,
            calls=was.calls,
            error=was.error,
        )
        return exchange, noted.head, noted.body

    def note(self, key: Key, exchange: Exchange, scope: Scope, said: list[tuple[bytes, bytes]]) -> None:
        """A request with that head is over, and the journey said so much in headers. It is noted if it was refused for the queue."""
        call = exchange.calls[0] if len(exchange.calls) == 1 else None
        error = None if call is None else call.outcome.error
        if call is None or not isinstance(error, NotAdmitted | QueueShareFull) or exchange.items is not None:
            return
        # Limits of the caller's own are told and kept elsewhere.
        if exchange.late_headers is not None or call.late_headers is not None or call.served_model is None or call.retried:
            return
        headers = dict(scope["headers"])
        if len(headers) != len(scope["headers"]) or not _UNLIKE_OTHERS.isdisjoint(headers):
            return
        if headers.get(b"connection", b"keep-alive").lower() != b"keep-alive":
            return
        if self._keeps_answers and wanted(call) != "off":
            return
        if len(self._noted) >= MOST_NOTED:
            self._noted.clear()
        any_body = not self._keeps_answers or "no-store" in call.cache_control.lower()
        exchange = Exchange(
            id="",
            method=exchange.method,
            address=exchange.address,
            forwarded=exchange.forwarded,
            openai=exchange.openai,
            route=exchange.route,
            status=exchange.status,
            caller=exchange.caller,
            calls=[call],
        )
        self._noted[key] = _Noted(exchange, call, time.monotonic() + NOTED, any_body, said, least_tokens(call))


def _answer(refused: HeadraceError, said: list[tuple[bytes, bytes]], *, openai: bool) -> tuple[bytes, bytes]:
    """Its status line and own headers, and its body."""
    whole = problem_answer(refused, openai=openai)
    status = b"HTTP/1.1 503 Service Unavailable\r\n" if whole.status == 503 else b"HTTP/1.1 429 Too Many Requests\r\n"
    headers = [(b"content-type", whole.content_type), (b"content-length", b"%d" % len(whole.body)), *whole.headers, *said]
    return status + b"".join([b"%b: %b\r\n" % header for header in headers]), whole.body
