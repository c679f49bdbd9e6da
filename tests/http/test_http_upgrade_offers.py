"""A request that offers another protocol, as those of Java's client do, is answered like any other."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from serving_echo import Stand, live, stand

BODY = b'{"prompt": "Say it."}'
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
POST = b"POST /chat HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
CLOSE = b"Connection: close\r\n"


@pytest.fixture(scope="module")
def house() -> Iterator[Stand]:
    with live(stand()) as made:
        yield made


def answers(house: Stand, *pieces: bytes) -> list[tuple[int, bytes]]:
    """Status and body of each answer on one connection, whose last request closes it."""
    address = urlsplit(house.url)
    with socket.create_connection((address.hostname, address.port), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            sock.sendall(piece)
        said = b""
        while part := sock.recv(65536):
            said += part
    found = []
    while said:
        head, _, said = said.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        found.append((int(head.split()[1]), said[:length]))
        said = said[length:]
    return found


WHOLE = POST + OFFER + CLOSE + LENGTH + b"\r\n" + BODY


@pytest.mark.parametrize(
    "pieces",
    [
        [WHOLE],
        [POST + OFFER + CLOSE + LENGTH + b"\r\n", BODY],
        [WHOLE[at : at + 1] for at in range(len(WHOLE))],
        [POST + OFFER + CLOSE + CHUNKED + b"\r\n" + CHUNKS],
        [POST + OFFER + CLOSE + CHUNKED + b"\r\n", CHUNKS],
        [WHOLE.replace(b"h2c", b"websocket")],
    ],
    ids=["at once", "body later", "byte by byte", "in chunks", "chunks later", "websocket"],
)
def test_its_body_is_read(house: Stand, pieces: list[bytes]) -> None:
    ((status, body),) = answers(house, *pieces)
    assert status == 200, body
    assert json.loads(body)["response"] == "Say it."


def test_its_body_is_no_request(house: Stand) -> None:
    hidden = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head = POST + OFFER + CLOSE + b"Content-Length: %d\r\n\r\n" % len(hidden)
    assert [status for status, _ in answers(house, head, hidden)] == [422]


def test_requests_behind_it_are_answered(house: Stand) -> None:
    one = POST + OFFER + LENGTH + b"\r\n" + BODY
    got = answers(house, one * 200 + WHOLE)
    assert [status for status, _ in got] == [200] * 201


def test_nothing_here_answers_connect(house: Stand) -> None:
    ((status, _),) = answers(house, b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert status == 400
