"""A whole server with too much to do: deadlines, priorities, and who is refused, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

SLOTS = 2
PACE = 0.02


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two sequences at a time, 50 tokens a second each, and room for six that wait."""
    folder = tmp_path_factory.mktemp("overload")
    limits = {"HEADRACE_MAX_QUEUE_REQUESTS": "6", "HEADRACE_TTFT_TARGET": "0"}
    with RunningServer(folder, f"echo?pace={PACE}", "--max-sequences", str(SLOTS), environment=limits) as running:
        yield running
        assert "Traceback" not in running.log


def ask(server: RunningServer, tokens: int = 5, *, key: str | None = None, **headers: str) -> httpx.Response:
    body = {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True}
    named = {f"X-{name.replace('_', '-')}": value for name, value in headers.items()}
    if key is not None:
        named["Authorization"] = f"Bearer {key}"
    return server.client.post("/v1/completions", json=body, headers=named, timeout=60)


def inside(server: RunningServer, *states: str) -> int:
    text = server.client.get("/metrics").text
    names = tuple(f"headrace_sequences_{state}" for state in states or ("running", "waiting"))
    return int(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names)))


def crowd(pool: ThreadPoolExecutor, server: RunningServer, count: int, tokens: int = 60, **more: Any) -> list[Any]:
    """Requests that are inside when this returns."""
    before = inside(server)
    asked = [pool.submit(ask, server, tokens, **more) for _ in range(count)]
    eventually(lambda: inside(server) >= before + count, what="a crowd")
    return asked


@pytest.mark.parametrize("said", ["0", "-1", "nan", "inf", "1e99", "soon", "", "1,2", "1_0"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/chat", {"prompt": "hi"}),
        ("/chat/stream", {"prompt": "hi"}),
        ("/chat/batch", [{"prompt": "hi"}]),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
def test_a_timeout_that_is_no_time_is_refused_in_the_words_of_the_dialect(server: RunningServer, path: str, body: Any, said: str) -> None:
    answer = server.client.post(path, json=body, headers={"X-Request-Timeout": said})
    assert answer.status_code == 400
    if path.startswith("/v1"):
        assert answer.json()["error"]["param"] == "X-Request-Timeout"
    else:
        assert answer.json()["code"] == "invalid_parameter"


def test_items_of_a_batch_have_the_timeout_too(server: RunningServer) -> None:
    items = [{"prompt": "x" * 200, "max_length": 200}, {"prompt": "hi", "max_length": 2}]
    answer = server.client.post("/chat/batch", json=items, headers={"X-Request-Timeout": "1"})
    late, fine = answer.json()["results"]
    assert late["error"]["code"] == "deadline_exceeded"
    assert "decod" in late["error"]["message"]
    assert fine["finish_reason"]


def test_a_priority_that_there_isnt_is_refused(server: RunningServer) -> None:
    answer = ask(server, Headrace_Priority="urgent")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Headrace-Priority"


def test_nobody_has_a_higher_priority_than_their_key(server: RunningServer) -> None:
    assert ask(server, Headrace_Priority="critical").headers["x-headrace-priority"] == "default"
    assert ask(server, Headrace_Priority="sheddable").headers["x-headrace-priority"] == "sheddable"
    assert "x-headrace-priority" not in ask(server).headers
    record, secret = server.new_key(priority="critical")
    assert record.priority == "critical"
    assert ask(server, key=secret, Headrace_Priority="critical").headers["x-headrace-priority"] == "critical"
    _, low = server.new_key(priority="sheddable")
    assert ask(server, key=low, Headrace_Priority="default").headers["x-headrace-priority"] == "sheddable"


def test_a_deadline_that_cant_be_met_is_refused_at_once_and_a_retry_is_not(server: RunningServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = crowd(pool, server, 5)
        refusal = ask(server, 1, Request_Timeout="0.5")
        assert refusal.status_code == 503
        assert refusal.json()["error"]["code"] == "deadline_unmeetable"
        # Answers that are kept and shared are made for their first caller's deadline, too.
        determined = server.client.post("/chat", json={"prompt": "x", "temperature": 0}, headers={"X-Request-Timeout": "0.5"})
        assert (determined.status_code, determined.json()["code"]) == (503, "deadline_unmeetable")
        began = time.monotonic()
        after = int(refusal.headers["retry-after"])
        eventually(lambda: time.monotonic() - began >= after, what="the time to retry")
        assert ask(server, 1, Request_Timeout="0.5").status_code == 200
        assert all(each.result().status_code == 200 for each in asked)
    assert 'headrace_admission_refusals_total{model="echo",priority="default",reason="deadline_unmeetable"}' in (
        server.client.get("/metrics").text
    )


def test_a_deadline_ends_what_runs_and_says_where_the_time_went(server: RunningServer) -> None:
    body = {"prompt": "x" * 300, "max_tokens": 300, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body, headers={"X-Request-Timeout": "0.5"}) as stream:
        text = stream.read().decode()
    assert "deadline_exceeded" in text
    assert "in the queue" in text
    assert "decod" in text


def test_the_sheddable_make_room_and_no_tenant_is_refused_for_anothers_crowd(server: RunningServer) -> None:
    _, critical = server.new_key(priority="critical")
    _, other = server.new_key()
    with ThreadPoolExecutor(24) as pool:
        running = crowd(pool, server, SLOTS, 250)
        eventually(lambda: inside(server, "running") == SLOTS, what="first tokens")
        waiting = crowd(pool, server, 6, 5, Headrace_Priority="sheddable")
        important = pool.submit(ask, server, 5, key=critical, Headrace_Priority="critical")
        mine = [pool.submit(ask, server, 5) for _ in range(5)]
        eventually(lambda: sum(each.done() for each in waiting) >= 6, what="the sheddable to be put out")
        theirs = pool.submit(ask, server, 5, key=other)
        codes = [each.result().json().get("error", {}).get("code") for each in waiting]
        assert codes == ["shed"] * 6
        assert all(each.result().status_code == 503 and "retry-after" in each.result().headers for each in waiting)
        assert important.result().status_code == 200
        assert theirs.result().status_code == 200
        gone = [each.result() for each in mine if each.result().status_code != 200]
        assert [each.json()["error"]["code"] for each in gone] == ["shed"], "the newest of the tenant with most"
        assert all(each.result().status_code == 200 for each in running)


def test_priority_goes_first(server: RunningServer) -> None:
    _, critical = server.new_key(priority="critical")
    ended: list[str] = []

    def noting(name: str, **more: Any) -> None:
        assert ask(server, 30, **more).status_code == 200
        ended.append(name)

    with ThreadPoolExecutor(12) as pool:
        crowd(pool, server, SLOTS, 60)
        before = inside(server)
        late = [pool.submit(noting, "default") for _ in range(4)]
        eventually(lambda: inside(server) >= before + 4, what="those that wait")
        early = pool.submit(noting, "critical", key=critical, Headrace_Priority="critical")
        for each in (*late, early):
            each.result()
    assert "critical" in ended[:2]


def test_a_flood_is_queued_and_refused_beyond_that_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = {"HEADRACE_TTFT_TARGET": "0.05"}  # beyond it requests are held back before the engine
    with (
        RunningServer(tmp_path, f"echo?pace={PACE}", "--max-sequences", str(SLOTS), environment=target) as running,
        ThreadPoolExecutor(64) as pool,
    ):
        ask(running, 10)
        asked = crowd(pool, running, SLOTS, 60)
        asked += [pool.submit(ask, running, 2) for _ in range(62)]
        # Those count where the processes are listed, too.
        eventually(lambda: running.ps()["workers"][0]["waiting"] == 62, what="a queue")
        answers = [each.result() for each in asked]
        assert [answer.status_code for answer in answers] == [200] * 64
        with running.client.stream("POST", "/chat/batch", json=[{"prompt": "hi", "max_length": 2}] * 64) as batch:
            results = json.loads(batch.read())["results"]
        assert all("response" in each for each in results)
        eventually(lambda: inside(running) == 0, what="an empty engine")
