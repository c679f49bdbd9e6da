"""How a stream begins where the connection takes nothing at first, or is lost already."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from starlette.types import Message

from headrace.errors import HeadraceError, Overloaded
from headrace.http.client_address import TrustedProxies
from headrace.http.exchange import open_exchange
from headrace.http.hangup import ClientGone, Watch
from headrace.http.line import Line
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


async def test_a_hang_up_while_a_comment_waits_for_the_connection_leaves_no_error_behind() -> None:
    """The comment's task was in the way of the first piece, whose task the hang-up cancels."""
    waiting = asyncio.Event()
    told: list[Callable[[], None]] = []
    errors: list[Any] = []

    async def send(message: Message) -> None:
        waiting.set()
        await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError("the line tells")

    async def source() -> AsyncGenerator[bytes]:
        await waiting.wait()
        asyncio.get_running_loop().call_later(0.01, told[0])
        yield b"a piece"

    def problem(error: HeadraceError) -> bytes:
        raise AssertionError

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/chat/stream", "headers": [], "client": ("127.0.0.1", 1)}
    exchange = scope["headrace"] = open_exchange(scope, TrustedProxies(()))
    exchange.line = cast(Line, SimpleNamespace(watch=told.append, unwatch=told.clear, in_chunks=False))
    stream = Streamed(source(), as_they_are, closing=lambda: b"", problem=problem, keep_alive=0.001)
    async with asyncio.timeout(10):
        with pytest.raises(ClientGone):
            await stream(scope, receive, send)
    await asyncio.sleep(0)
    del stream
    gc.collect()
    assert errors == []
    assert not told


def line(*, closing: bool = False) -> tuple[Line, Any]:
    """One of a request that others were sent behind: uvicorn tells only the last of them that the connection was lost."""
    cycle = SimpleNamespace(
        disconnected=False,
        flow=SimpleNamespace(resume_reading=lambda: None, write_paused=False),
        transport=SimpleNamespace(is_closing=lambda: closing),
    )
    transport = SimpleNamespace(write=lambda piece: None)
    return Line(cast(Any, SimpleNamespace(line=None, transport=transport)), cast(Any, cycle)), cycle


@pytest.mark.parametrize("before", [True, False])
async def test_a_lost_connection_is_heard_by_the_request_that_others_were_sent_behind(before: bool) -> None:
    async def receive() -> Message:
        raise AssertionError("the line tells")

    one, cycle = line(closing=before)
    if not before:
        asyncio.get_running_loop().call_later(0.01, one.lost)
    async with asyncio.timeout(10):
        with pytest.raises(ClientGone):
            async with Watch(receive, one):
                await asyncio.Event().wait()
    assert cycle.disconnected  # so nothing is written any more
    assert not one.open
