"""Hang-ups, keep-alives, and errors before and amid a stream, over a real socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving_echo import ScriptedEngine, Stand, live, stand
from strict_sse import parse

from headrace.errors import EngineDied, Overloaded
from headrace.types import Delta, GenerateRequest, Report

pytestmark = pytest.mark.slow


async def ticking(request: GenerateRequest) -> Any:
    for index in range(100_000):
        yield [Delta(0, index, (65,), "A")]
        await asyncio.sleep(0.01)


async def silent(request: GenerateRequest) -> Any:
    await asyncio.sleep(3600)
    yield []


def post(made: Stand, path: str, body: Any) -> socket.socket:
    raw = json.dumps(body).encode()
    url = urlsplit(made.url)
    assert url.hostname is not None
    connection = socket.create_connection((url.hostname, url.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


MESSAGES = [{"role": "user", "content": "x"}]

ROUTES = [
    ("/chat", {"prompt": "x"}),
    ("/chat/stream", {"prompt": "x"}),
    ("/chat/batch", [{"prompt": "x"}, {"prompt": "y"}]),
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/chat/completions", {"messages": MESSAGES, "stream": True}),
    ("/v1/completions", {"prompt": ["x", "y"]}),
    ("/v1/completions", {"prompt": ["x", "y"], "stream": True}),
    ("/v1/completions", {"prompt": "x", "stream": True}),
]


@pytest.mark.parametrize("script", [ticking, silent], ids=["amid tokens", "before the first"])
def test_a_hang_up_reaches_the_engine_from_every_route(script: Any) -> None:
    closed: list[int] = []
    entered = threading.Semaphore(0)
    over = threading.Semaphore(0)

    async def watched(request: GenerateRequest) -> Any:
        entered.release()
        try:
            async for batch in script(request):
                yield batch
        finally:
            closed.append(1)
            over.release()

    with live(stand(ScriptedEngine(watched))) as made:
        for path, body in ROUTES:
            several = 2 if isinstance(body, list) or isinstance(body.get("prompt"), list) else 1
            connection = post(made, path, body)
            for _ in range(several):
                assert entered.acquire(timeout=10), path
            connection.close()
            for _ in range(several):
                assert over.acquire(timeout=5), f"{path}: nobody told the engine"
    assert len(closed) == sum(2 if isinstance(body, list) or isinstance(body.get("prompt"), list) else 1 for _, body in ROUTES)


def test_comments_keep_a_waiting_stream_alive_and_a_late_refusal_is_an_event() -> None:
    async def late(request: GenerateRequest) -> Any:
        await asyncio.sleep(0.35)
        if request.sampling.max_tokens == 7:
            raise Overloaded("Too much.")
        yield [Delta(0, 0, (65,), "A")]
        await asyncio.sleep(0.35)
        yield [Delta(0, 1, (66,), "B", "stop")]
        yield [Report(1, 0, 2, 1, 2, 3)]

    with live(stand(ScriptedEngine(late), keepalive_interval=0.1)) as made, httpx.Client(base_url=made.url, timeout=30) as http:
        good = http.post("/chat/stream", json={"prompt": "x"})
        parsed = parse(good.content)
        assert [data for name, data in parsed.events if name == "message"] == ["A", "B"]
        assert parsed.comments.count("keep-alive") >= 4
        assert parsed.comments[-1] == "queue;dur=1.0, prefill;dur=2.0, decode;dur=3.0"
        assert good.content.startswith(b": keep-alive")

        bad = http.post("/chat/stream", json={"prompt": "x", "max_length": 7})
        assert bad.status_code == 200
        name, data = parse(bad.content).events[-1]
        assert name == "error"
        assert json.loads(data) == {"detail": "Too much.", "code": "overloaded"}

        openai = http.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": True, "max_tokens": 7})
        name, data = parse(openai.content).events[-1]
        assert json.loads(data)["error"]["code"] == "overloaded"
        assert b"[DONE]" not in openai.content


def test_a_refusal_before_the_first_token_keeps_its_status() -> None:
    async def refuses(request: GenerateRequest) -> Any:
        raise Overloaded("Too much.", retry_after=2.5)
        yield []

    with live(stand(ScriptedEngine(refuses))) as made, httpx.Client(base_url=made.url, timeout=30) as http:
        for path, body in ROUTES:
            answer = http.post(path, json=body)
            if path == "/chat/batch":
                assert [result["error"]["status"] for result in answer.json()["results"]] == [503, 503]
                continue
            assert answer.status_code == 503, path
            assert answer.headers["retry-after"] == "3"
            assert answer.headers["content-type"] == "application/json"


def test_an_engine_that_dies_amid_a_stream_is_an_error_event() -> None:
    async def dies(request: GenerateRequest) -> Any:
        yield [Delta(0, 0, (65,), "A")]
        raise EngineDied("It died.")

    with live(stand(ScriptedEngine(dies))) as made, httpx.Client(base_url=made.url, timeout=30) as http:
        events = parse(http.post("/chat/stream", json={"prompt": "x"}).content).events
        assert events[0] == ("message", "A")
        assert events[1][0] == "error"
        assert json.loads(events[1][1])["code"] == "engine_died"
        assert http.post("/chat", json={"prompt": "x"}).status_code == 502


def test_a_fault_of_ours_is_told_without_its_details() -> None:
    async def faulty(request: GenerateRequest) -> Any:
        if request.sampling.max_tokens == 7:
            yield [Delta(0, 0, (65,), "A")]
        raise ZeroDivisionError("secret detail")

    with live(stand(ScriptedEngine(faulty))) as made, httpx.Client(base_url=made.url, timeout=30) as http:
        whole = http.post("/chat", json={"prompt": "x"})
        assert whole.status_code == 500
        assert whole.json()["code"] == "internal_error"
        openai = http.post("/v1/completions", json={"prompt": "x"})
        assert openai.status_code == 500
        assert openai.json()["error"]["type"] == "server_error"
        begun = parse(http.post("/chat/stream", json={"prompt": "x", "max_length": 7}).content).events
        assert begun[-1][0] == "error"
        for answer in (whole.text, openai.text, str(begun)):
            assert "secret" not in answer


def test_an_unread_body_that_is_too_large_doesnt_break_the_connection() -> None:
    with live(stand(max_body_mib=1)) as made, httpx.Client(base_url=made.url, timeout=30) as http:
        assert http.post("/chat", content=b"x" * 4_000_000).status_code == 413
        assert http.post("/chat", json={"prompt": "x"}).status_code == 200
