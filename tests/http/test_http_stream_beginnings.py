"""How a stream's headers are sent, where the connection takes nothing at first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from starlette.types import Message

from headrace.errors import HeadraceError, Overloaded
from headrace.http.client_address import TrustedProxies
from headrace.http.exchange import open_exchange
from headrace.http.stream import Streamed, as_they_are

pytestmark = pytest.mark.anyio


async def test_a_refusal_keeps_its_status_while_a_comment_waits_for_the_connection() -> None:
    waiting = asyncio.Event()
    sent: list[Message] = []

    async def send(message: Message) -> None:
        waiting.set()
        await asyncio.Event().wait()
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def refused() -> AsyncGenerator[bytes]:
        await waiting.wait()
        raise Overloaded("Too much to do.")
        yield b""

    def problem(error: HeadraceError) -> bytes:
        raise AssertionError("it is told by the route")

    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/chat/stream", "headers": [], "client": ("127.0.0.1", 1)}
    scope["headrace"] = open_exchange(scope, TrustedProxies(()))
    stream = Streamed(refused(), as_they_are, closing=lambda: b"", problem=problem, keep_alive=0.001)
    async with asyncio.timeout(10):
        with pytest.raises(Overloaded):
            await stream(scope, receive, send)
    assert sent == []
