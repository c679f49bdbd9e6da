"""Whole answers: a status, headers and one body. Streams are in `stream`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

Headers = Iterable[tuple[bytes, bytes]]
JSON = b"application/json"


class Answer(Protocol):
    """What a route returns: an ASGI application that sends the response."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None: ...


class Whole:
    """A response whose body is at hand."""

    __slots__ = ("body", "content_type", "headers", "status")

    def __init__(self, body: bytes, *, status: int = 200, content_type: bytes = JSON, headers: Headers = ()) -> None:
        self.body = body
        self.status = status
        self.content_type = content_type
        self.headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = str(len(self.body)).encode()
        headers = [(b"content-type", self.content_type), (b"content-length", length), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


def json_answer(value: Any, *, status: int = 200, headers: Headers = ()) -> Whole:
    return Whole(msgspec.json.encode(value), status=status, headers=headers)
