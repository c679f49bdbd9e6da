"""How an answer is written to its connection."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from serving_echo import Stand, live, stand

from headrace.http.line import HeadWithBody

HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"


def kept() -> tuple[HeadWithBody, list[bytes]]:
    """With all that reached the transport."""
    written: list[bytes] = []
    transport = SimpleNamespace(write=written.append, close=lambda: written.append(b"(closed)"), is_closing=lambda: False)
    return HeadWithBody(cast(asyncio.Transport, transport)), written


def test_a_head_goes_with_the_first_of_its_body() -> None:
    one, written = kept()
    one.write(HEAD)
    assert written == []
    one.write(b"Hello")
    one.write(b", you")
    assert written == [HEAD + b"Hello", b", you"]


def test_a_head_without_a_body_goes_too() -> None:
    one, written = kept()
    one.write(HEAD)
    one.write(b"")
    assert written == [HEAD]
    one, written = kept()
    one.write(HEAD)
    one.close()
    assert written == [HEAD, b"(closed)"]


def test_who_waits_for_leave_to_send_a_body_gets_it_at_once() -> None:
    one, written = kept()
    one.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    one.write(HEAD)
    assert len(written) == 1


def connected(made: Stand) -> socket.socket:
    url = urlsplit(made.url)
    assert url.hostname is not None
    return socket.create_connection((url.hostname, url.port), timeout=10)


@pytest.mark.slow
def test_over_a_real_connection() -> None:
    with live(stand()) as made, connected(made) as connection:

        def ask(request: bytes) -> bytes:
            connection.sendall(request)
            return connection.recv(65536)

        for _ in range(3):
            whole = ask(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert whole.startswith(b"HTTP/1.1 404 ")
            assert whole.endswith(b"}")
        head = ask(b"HEAD /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")
        body = b'{"prompt": "x", "max_length": 2}'
        asked = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n"
        assert ask(asked % len(body)) == b"HTTP/1.1 100 Continue\r\n\r\n"
        answer: Any = ask(body)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"}")
