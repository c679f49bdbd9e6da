"""Clients that don't read, or read slowly, with real processes and raw sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

TIMEOUT = 1.5
TOKENS = 30_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environment = {"HEADRACE_SLOW_CLIENT_TIMEOUT": str(TIMEOUT), "HEADRACE_RESPONSE_CACHE": "on"}
    with RunningServer(tmp_path_factory.mktemp("slow"), "echo?context=200000", environment=environment) as running:
        yield running


@contextmanager
def asking(server: RunningServer, **asked: Any) -> Iterator[socket.socket]:
    """A client that has sent its request, and whose own side takes in little."""
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(
        {"model": "echo", "prompt": "abcdefgh", "stream": True, "ignore_eos": True, "max_tokens": TOKENS}
        | {"stream_options": {"include_usage": True}}
        | asked
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(30)
        sock.connect((host, int(port)))
        sock.sendall(head.encode() + body)
        yield sock


def rest_of(sock: socket.socket) -> bytes:
    """All that still comes; a reset ends it."""
    read = bytearray()
    try:
        while piece := sock.recv(65536):
            read += piece
    except ConnectionResetError:
        pass
    return bytes(read)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_who_reads_nothing_is_cut_off_and_little_was_held(server: RunningServer, temperature: float) -> None:
    cut = len(server.events("slow client cut off"))
    with asking(server, temperature=temperature, prompt=f"nothing {temperature}") as sock:
        eventually(lambda: server.worker()["running"] == 1 or server.events("slow client cut off")[cut:], what="the stream")
        # It rests, out of the engine, long before it is cut off.
        eventually(lambda: server.worker()["running"] == 0, within=TIMEOUT)
        eventually(lambda: server.events("slow client cut off")[cut:], within=TIMEOUT + 8)
        eventually(lambda: _last_request(server, "/v1/completions"))
        assert server.worker()["running"] == server.worker()["waiting"] == 0
        assert len(rest_of(sock)) < 64 * 1024
    said = _last_request(server, "/v1/completions")
    assert said["hung_up"]
    # Paid for what was made, and no more was made than is held for anybody.
    assert 0 < said["completion_tokens"] < 20_000


def _last_request(server: RunningServer, route: str) -> dict[str, Any]:
    return next((line for line in reversed(server.events("request")) if line["route"] == route), {})


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_who_reads_slowly_gets_all_of_it(server: RunningServer, temperature: float) -> None:
    with asking(server, temperature=temperature, prompt=f"slowly {temperature}!") as sock:
        read = bytearray()
        began = time.monotonic()
        # Slower than the limit as a whole, but never still for so long.
        while time.monotonic() - began < 2 * TIMEOUT:
            read += sock.recv(2048)
            time.sleep(0.05)
        while b"data: [DONE]" not in read[-200:]:
            piece = sock.recv(65536)
            assert piece
            read += piece
    lines = [json.loads(line[6:]) for line in _body(bytes(read)).split(b"\n") if line.startswith(b"data: {")]
    assert not [line for line in lines if "error" in line]
    text = "".join(choice["text"] for line in lines for choice in line["choices"])
    prompt = f"slowly {temperature}!"
    assert len(text) == TOKENS
    assert text == (prompt * (TOKENS // len(prompt) + 1))[:TOKENS]
    usage = [line["usage"] for line in lines if line.get("usage")]
    assert usage[-1]["completion_tokens"] == TOKENS


def _body(answer: bytes) -> bytes:
    """Without headers and chunk sizes."""
    rest = answer.partition(b"\r\n\r\n")[2]
    body = bytearray()
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        body += rest[:length]
        rest = rest[length + 2 :]
    return bytes(body)


def test_a_whole_answer_that_nobody_reads_is_cut_off_too(server: RunningServer) -> None:
    cut = len(server.events("slow client cut off"))
    with asking(server, stream=False, stream_options=None, max_tokens=150_000, prompt="whole"):
        eventually(lambda: server.events("slow client cut off")[cut:], within=TIMEOUT + 15)
