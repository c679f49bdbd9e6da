"""Who sends what was just refused for a crowded queue is refused at the door, and nobody else is."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from serving_echo import CONTEXT, KEY, ByteTokenizer, Stand, live, stand

from headrace.engine.echo import EchoEngine
from headrace.http import door as door_module
from headrace.http.door import Door
from headrace.waiting import Bounds, Line, Newcomer, Queue

pytestmark = pytest.mark.slow

FULL = Queue(lines=(Line(tenant=-1, rank=5, requests=9, sequences=9, tokens=10_000),), speed=100.0)
"""A hundred seconds' work, all of it more important than anybody's."""


class Crowded(EchoEngine):
    """Says that its queue is crowded, as long as it is."""

    queue: Queue | None = FULL

    def crowd(self) -> tuple[Queue, Bounds] | None:
        return None if self.queue is None else (self.queue, Bounds(1000, 1_000_000, 5.0))

    def let_in(self, newcomer: Newcomer) -> None:
        pass


class Asking:
    """A server, a connection to it, and how many of its requests were refused at the door."""

    def __init__(self, made: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = made
        self.at_door = 0
        real = Door.refusal

        def counted(door: Door, *arguments: Any) -> Any:
            refused = real(door, *arguments)
            self.at_door += refused is not None
            return refused

        monkeypatch.setattr(Door, "refusal", counted)
        url = urlsplit(made.url)
        assert url.hostname is not None
        self.connection = socket.create_connection((url.hostname, url.port), timeout=10)

    def ask(self, body: Any, path: str = "/v1/chat/completions", *headers: str, pieces: int = 1) -> tuple[int, dict[str, str], Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(raw)}", *headers]
        data = "\r\n".join([*lines, "", ""]).encode() + raw
        if pieces == 1:
            self.connection.sendall(data)
        else:
            self.connection.sendall(data[:40])
            httpx.get(f"{self.made.url}/health/live")  # the server has read it by then
            self.connection.sendall(data[40:])
        return self.answer()

    def answer(self) -> tuple[int, dict[str, str], Any]:
        got = b""
        while b"\r\n\r\n" not in got:
            got += self.connection.recv(65536)
        head, _, rest = got.partition(b"\r\n\r\n")
        first, *others = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in others)
        while len(rest) < int(headers["content-length"]):
            rest += self.connection.recv(65536)
        return int(first.split()[1]), headers, json.loads(rest)


@contextmanager
def asking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asking]:
    engine = Crowded(ByteTokenizer(), name="echo-1", context_length=CONTEXT, fingerprint="fp_echo")
    with live(stand(engine)) as made:
        one = Asking(made, monkeypatch)
        try:
            yield one
        finally:
            one.connection.close()


BODY = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", BODY), ("/chat", {"prompt": "Hello"}), ("/chat/stream", {"prompt": "Hello"})]
)
def test_the_same_again_is_refused_alike_and_counted_alike(monkeypatch: pytest.MonkeyPatch, path: str, body: Any) -> None:
    with asking(monkeypatch) as one:
        answers = [one.ask(body | ({"temperature": 0.5} if number == 3 else {}), path) for number in range(5)]
        assert one.at_door == 4
        assert {status for status, _, _ in answers} == {503}
        assert len({headers["x-request-id"] for _, headers, _ in answers}) == 5
        for _, headers, _ in answers:
            del headers["x-request-id"], headers["date"]
        first = answers[0]
        assert first[1]["retry-after"] == "100"
        assert "wait_too_long" in str(first[2])
        assert all(answer == first for answer in answers)
        metrics = httpx.get(f"{one.made.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        assert f'route="{path}",status="503"}} 5.0' in metrics
        assert re.search(r'headrace_admission_refusals_total{[^}]*reason="wait_too_long"} 5.0', metrics)
        assert re.search(r'headrace_errors_total{code="wait_too_long",model="[^"]+"} 5.0', metrics)
        assert "headrace_requests_in_flight 1.0" in metrics  # this one


def test_who_would_be_let_in_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as one:
        assert [one.ask(BODY)[0] for _ in range(3)] == [503, 503, 503]
        assert one.at_door == 2
        # A queue that has room for it.
        one.made.engine.queue = Queue(speed=100.0)
        assert one.ask(BODY)[0] == 200
        one.made.engine.queue = None
        assert one.ask(BODY)[0] == 200
        one.made.engine.queue = FULL
        assert one.ask(BODY)[0] == 503
        assert one.at_door == 2


def test_another_head_goes_the_way_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as one:
        assert [one.ask(BODY)[0] for _ in range(2)] == [503, 503]
        assert one.ask(BODY, "/v1/chat/completions", "Authorization: Bearer wrong")[0] == 503  # no key is required here
        assert one.ask(BODY, "/v1/completions")[0] == 400
        status, headers, _ = one.ask(BODY, "/v1/chat/completions", "X-Client-Request-Id: mine")
        assert (status, headers["x-client-request-id"]) == (503, "mine")
        assert one.ask(BODY, "/v1/chat/completions", "X-Client-Request-Id: mine")[1]["x-client-request-id"] == "mine"
        assert one.at_door == 1
        for _ in range(3):
            assert one.ask(BODY, "/v1/chat/completions", "Connection: keep-alive")[0] == 503
        assert one.at_door == 3
        for _ in range(2):
            one.connection.close()
            url = urlsplit(one.made.url)
            one.connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=10)
            assert one.ask(BODY, "/v1/chat/completions", "Connection: close")[1]["connection"] == "close"
            assert one.connection.recv(1) == b""
        assert one.at_door == 3


def test_what_comes_in_pieces_or_two_at_once_is_answered_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as one:
        assert one.ask(BODY)[0] == 503
        assert one.ask(BODY, pieces=2)[0] == 503
        assert one.at_door == 0
        raw = json.dumps(BODY).encode()
        data = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw)
        one.connection.sendall((data + raw) * 2)
        got = b""
        while got.count(b"HTTP/1.1 503") < 2 or not got.endswith(b"}}"):
            got += one.connection.recv(65536)
        assert one.at_door == 0
        assert one.ask(BODY)[0] == 503
        assert one.at_door == 1


def test_it_is_noted_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_module, "NOTED", 0.0)
    with asking(monkeypatch) as one:
        assert [one.ask(BODY)[0] for _ in range(3)] == [503] * 3
        assert one.at_door == 0


def test_what_the_cache_may_have_an_answer_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as one:
        one.made.app.state.door._keeps_answers = True
        assert [one.ask(BODY)[0] for _ in range(2)] == [503, 503]
        assert one.at_door == 1
        one.ask(BODY | {"temperature": 0})
        one.ask(BODY | {"seed": 1})
        assert one.at_door == 1
        for _ in range(2):
            one.ask(BODY | {"temperature": 0}, "/v1/chat/completions", "Cache-Control: no-store")
        assert one.at_door == 2


def test_a_small_one_isnt_refused_for_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with asking(monkeypatch) as one:
        # 100 tokens a second: what is longer than 5 s is too long.
        one.made.engine.queue = msgspec.structs.replace(FULL, lines=(Line(-1, 5, 1, 1, 10),), own=0.02)
        large = {"messages": [{"role": "user", "content": "word " * 400}]}
        assert [one.ask(large)[0] for _ in range(3)] == [503] * 3
        assert one.at_door == 2
        assert one.ask(BODY)[0] == 200
        assert one.ask(large)[0] == 503
        assert one.at_door == 3
