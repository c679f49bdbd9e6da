"""Whole servers whose engines fail: upstreams that break, workers that are killed, queues that grow."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.upstream import DONE, USAGE, Reply, Upstream, chunk, serving
from real_servers import free_port
from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

FINE = [chunk("up"), chunk("stream", "stop"), USAGE, DONE]
BROKEN = Reply([b'{"error": {"message": "out of order"}}'], status=500, kind="application/json")


@contextmanager
def upstream(port: int = 0) -> Iterator[Upstream]:
    """A real server elsewhere, in a thread of its own."""
    app, begun, over = Upstream(), threading.Event(), threading.Event()

    async def live() -> None:
        async with serving(app, port):
            begun.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert begun.wait(20)
    app.replies = [Reply(FINE)]
    try:
        yield app
    finally:
        over.set()
        thread.join(20)


def settings(**fields: Any) -> dict[str, str]:
    plain = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {f"HEADRACE_{name.upper()}": value for name, value in plain.items()}


def ask(url: str, text: str = "hello", *, stream: bool = False, **fields: Any) -> httpx.Response:
    """On a connection of its own, so that any of the API processes may take it."""
    body = {"messages": [{"role": "user", "content": text}], "stream": stream, **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30, trust_env=False)


def text_of(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("text/event-stream"):
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        return "".join(choice["delta"].get("content") or "" for piece in chunks for choice in piece.get("choices", ()))
    return str(answer.json()["choices"][0]["message"]["content"])


def kill(server: RunningServer, pid: int) -> None:
    """End an engine, and wait until it is known."""
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: server.client.get("/health/ready").status_code == 503, what="word of the death")


def breaker_states(server: RunningServer) -> set[float]:
    """As several connections see it, which several processes answer."""
    states = set()
    for _ in range(6):
        with httpx.Client(base_url=server.url, trust_env=False) as client:
            found = re.search(r'headrace_breaker_state\{model="remote"\} (\S+)', client.get("/metrics").text)
            assert found is not None
            states.add(float(found[1]))
    return states


def test_an_upstream_that_breaks_is_replaced_left_alone_and_tried_again(tmp_path: Path) -> None:
    environment = settings(
        fallbacks={"remote": ["echo", "canned: later"]},
        retry_budget=0,
        breaker_min_calls=6,
        breaker_open_seconds=1,
        breaker_probes=2,
        max_workers=2,
    )
    with upstream() as app, RunningServer(tmp_path, app.url, environment=environment) as server:
        answer = ask(server.url)
        assert (text_of(answer), answer.headers["x-headrace-model"]) == ("upstream", "remote")
        assert "x-headrace-fallback" not in answer.headers
        assert answer.json()["model"] == "remote"

        app.replies = [BROKEN]
        for stream in (False, True):
            answer = ask(server.url, "say this", stream=stream)
            assert answer.status_code == 200
            assert text_of(answer) == "say this"
            assert (answer.headers["x-headrace-model"], answer.headers["x-headrace-fallback"]) == ("echo", "upstream_error")
            assert '"model":"echo"' in answer.text

        # Nothing of the fallback's is put behind what the upstream has said.
        app.replies = [Reply([chunk("half")], cut=True)]
        answer = ask(server.url, "say this", stream=True)
        assert text_of(answer) == "half"
        assert "upstream_error" in answer.text
        assert "[DONE]" not in answer.text
        assert answer.headers["x-headrace-model"] == "remote"

        app.replies = [BROKEN]
        opened = eventually(lambda: _reasons(server, "circuit_open"), what="an open circuit")
        assert opened.headers["x-headrace-model"] == "echo"
        assert breaker_states(server) <= {1.0, 2.0}
        health = httpx.get(f"{server.url}/health", trust_env=False).json()
        circuits = {model["name"]: model["circuit"] for model in health["models"]}
        assert circuits["remote"] in ("open", "half_open")
        assert circuits["echo"] == "closed"

        app.replies = [Reply(FINE)]
        eventually(lambda: "x-headrace-fallback" not in ask(server.url).headers, what="an upstream that is trusted again")
        eventually(lambda: ask(server.url) and breaker_states(server) == {0.0}, what="a closed circuit on all processes")
        metrics = httpx.get(f"{server.url}/metrics", trust_env=False).text
        counted = re.search(r'headrace_fallbacks_total\{model="remote",reason="upstream_error"\} (\S+)', metrics)
        assert counted is not None
        assert float(counted[1]) >= 3


def _reasons(server: RunningServer, reason: str) -> httpx.Response | None:
    answer = ask(server.url)
    return answer if answer.headers.get("x-headrace-fallback") == reason else None


def test_an_open_circuit_asks_nothing_of_the_upstream(tmp_path: Path) -> None:
    environment = settings(retry_budget=0, breaker_min_calls=4, breaker_open_seconds=60, max_workers=2)
    with upstream() as app, RunningServer(tmp_path, app.url, environment=environment) as server:
        app.replies = [BROKEN]
        eventually(lambda: ask(server.url).json()["error"]["code"] == "circuit_open", what="an open circuit")
        eventually(lambda: breaker_states(server) == {2.0}, what="an open circuit on all processes")
        before = len(app.asked)
        for _ in range(8):
            answer = ask(server.url)
            assert answer.status_code == 503
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert len(app.asked) == before


def test_hiccups_are_not_seen(tmp_path: Path) -> None:
    with upstream() as app, RunningServer(tmp_path, app.url) as server:
        app.replies = [BROKEN, Reply(FINE)]
        answer = ask(server.url)
        assert answer.status_code == 200
        assert text_of(answer) == "upstream"
        assert [headers["x-request-id"] for _, _, headers in app.asked] == [answer.headers["x-request-id"]] * 2


def test_a_fallback_answers_while_the_engine_is_started_again(tmp_path: Path) -> None:
    environment = settings(fallbacks={"echo": ["http://127.0.0.1:9/v1", "echo?pace=0.001"]})
    with RunningServer(tmp_path, "echo?load=2", environment=environment) as server:
        # Upstreams that are away don't keep the server from starting, nor from being well.
        assert server.client.get("/health/ready").status_code == 200
        eventually(lambda: len([line for line in server.ps()["workers"] if line["state"] == "ready"]) == 2, what="two engines")
        first = ask(server.url)
        assert first.headers["x-headrace-model"] == "echo"
        worker = next(line for line in server.ps()["workers"] if line["model"] == "echo")
        kill(server, worker["pid"])
        # The upstream is away as well; the last of the chain answers.
        answer = ask(server.url)
        assert answer.headers["x-headrace-fallback"] == "engine_unavailable"
        assert answer.headers["x-headrace-model"] == "echo-2"
        assert text_of(answer) == "hello"
        assert server.client.get("/health/ready").status_code == 503
        eventually(lambda: "x-headrace-fallback" not in ask(server.url).headers, what="the model itself")
        usage = [line for line in server.events("request") if line.get("model") == "echo-2"]
        assert usage
        assert all(line["status"] == 200 for line in usage)


def test_a_server_whose_upstream_is_away_starts_where_fallbacks_answer(tmp_path: Path) -> None:
    port = free_port()
    environment = settings(fallbacks={"remote": ["canned: later"]})
    with RunningServer(tmp_path, f"http://127.0.0.1:{port}/v1", environment=environment) as server:
        ready = server.client.get("/health/ready")
        assert ready.status_code == 200
        assert "remote is away" in ready.json()["reason"]
        assert "doesn't answer" in ready.json()["reason"]
        assert server.client.get("/health/startup").status_code == 200
        answer = ask(server.url)
        assert (text_of(answer), answer.headers["x-headrace-fallback"]) == ("later", "engine_unavailable")
        assert any("fallbacks answer" in line["note"] for line in server.events("note"))
        with upstream(port):
            eventually(lambda: text_of(ask(server.url)) == "upstream", within=30, what="the upstream's answer")
            assert server.client.get("/health/ready").json() == {"status": "ready"}


def test_a_long_queue_degrades_and_no_degraded_answer_is_kept(tmp_path: Path) -> None:
    environment = settings(
        max_sequences=1,
        degrade_queue=1,
        degrade_max_tokens=3,
        degrade_model="echo?pace=0.002",
        max_workers=2,
        response_cache="on",
    )
    with RunningServer(tmp_path, "echo?pace=0.02", environment=environment) as server, ThreadPoolExecutor(8) as crowd, ExitStack() as later:
        running = [crowd.submit(ask, server.url, "x" * 50 + str(number)) for number in range(4)]
        later.callback(lambda: [each.result() for each in running])
        eventually(lambda: next(line for line in server.ps()["workers"] if line["model"] == "echo")["waiting"] >= 2, what="a queue")
        time.sleep(0.12)  # an engine's word on its queue is believed so long
        answer = ask(server.url, "a question", temperature=0)
        assert answer.headers["x-headrace-degraded"] == "model=echo-2, max_tokens=3"
        assert answer.headers["x-headrace-model"] == "echo-2"
        assert answer.json()["model"] == "echo-2"
        assert text_of(answer) == "a q"
        assert answer.json()["choices"][0]["finish_reason"] == "length"
        [each.result() for each in running]
        eventually(lambda: server.ps()["workers"][0]["waiting"] == 0)
        time.sleep(0.12)
        whole = ask(server.url, "a question", temperature=0)
        assert text_of(whole) == "a question"
        assert "x-headrace-degraded" not in whole.headers
        assert whole.headers["x-headrace-cache"] == "miss"


def test_an_answer_that_has_expired_is_better_than_none(tmp_path: Path) -> None:
    environment = settings(fallbacks={"echo": ["cache"]}, response_cache="on", cache_ttl=0.5)
    with RunningServer(tmp_path, "echo?load=2", environment=environment) as server:
        assert ask(server.url, "known", temperature=0).headers["x-headrace-cache"] == "miss"
        time.sleep(0.5)
        kill(server, server.worker()["pid"])
        for stream in (False, True):
            answer = ask(server.url, "known", temperature=0, stream=stream)
            assert answer.headers["x-headrace-fallback"] == "engine_unavailable"
            assert text_of(answer) == "known"
            assert (answer.headers["x-headrace-model"], answer.headers["x-headrace-cache"]) == ("echo", "hit")
        assert ask(server.url, "unknown", temperature=0).status_code == 503
