"""Whole servers that call a webhook: when their engine is down, when requests fail or wait, when a budget is nearly spent."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.upstream import DONE, USAGE, Reply, Upstream, chunk, serving
from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

SECRET = "a secret of the receiver's"


class Receiver:
    """What a webhook's owner runs. `status` is what it answers; only what it took with a 200 is in `taken`."""

    def __init__(self) -> None:
        self.taken: list[dict[str, Any]] = []
        self.refused = 0
        self.status = 200
        receiver = self

        class Hook(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.status
                # Kept before it is answered: the next one comes after the answer, to another thread.
                if status != 200 or self.path != "/hook?token=of-the-receiver":
                    receiver.refused += 1
                else:
                    expected = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
                    assert self.headers["X-Headrace-Signature"] == f"sha256={expected}"
                    assert self.headers["Content-Type"] == "application/json"
                    receiver.taken.append(json.loads(body))
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing to say."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/hook?token=of-the-receiver"

    def wait_for(self, name: str, status: str, count: int = 1) -> dict[str, Any]:
        """The alert of that name, once it was said `count` times that it has that status."""

        def found() -> dict[str, Any] | None:
            said = [alert for body in list(self.taken) for alert in body["alerts"]]
            matching = [alert for alert in said if alert["labels"]["alertname"] == name and alert["status"] == status]
            assert len(matching) <= count, matching
            return matching[-1] if len(matching) == count else None

        return eventually(found, what=f"{name} {status}") or {}


@contextmanager
def receiving() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        receiver.server.server_close()
        thread.join(10)


def settings(receiver: Receiver, **fields: Any) -> dict[str, str]:
    ours = {"alert_webhook": receiver.url, "alert_webhook_secret": SECRET, "alert_engine_down_seconds": 3600, "alert_min_requests": 4}
    return {f"HEADRACE_{name.upper()}": str(value) for name, value in (ours | fields).items()}


def ask(url: str, *, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "one two three four"}], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=60, trust_env=False)


def test_an_engine_that_is_down_is_told_of_also_later_and_so_is_its_return(tmp_path: Path) -> None:
    with receiving() as receiver:
        receiver.status = 302
        environment = settings(receiver, alert_engine_down_seconds=0.05, max_workers=2)
        with RunningServer(tmp_path, "echo", environment=environment) as server:
            os.kill(server.worker()["pid"], signal.SIGKILL)
            # It has moved to a place that nobody is sent to.
            eventually(lambda: receiver.refused, what="an attempt")
            eventually(lambda: server.events("alert cleared"), what="the engine's return")
            assert ask(server.url).status_code == 200
            assert receiver.taken == []
            receiver.status = 200
            fired = receiver.wait_for("HeadraceEngineDown", "firing")
            cleared = receiver.wait_for("HeadraceEngineDown", "resolved")

            assert [body["status"] for body in receiver.taken] == ["firing", "resolved"]
            assert fired["labels"] == cleared["labels"]
            assert fired["labels"]["model"] == "echo"
            assert fired["labels"]["severity"] == "critical"
            assert fired["labels"]["instance"].endswith(f":{httpx.URL(server.url).port}")
            assert "SIGKILL" in fired["annotations"]["description"]
            assert fired["endsAt"].startswith("0001-")
            assert fired["startsAt"] == cleared["startsAt"] <= cleared["endsAt"]
            assert fired["fingerprint"] == cleared["fingerprint"]
            body = receiver.taken[0]
            assert (body["version"], body["truncatedAlerts"], body["receiver"]) == ("4", 0, "headrace")
            assert body["commonLabels"] == body["groupLabels"] == fired["labels"]
            assert body["commonAnnotations"] == fired["annotations"]
            assert body["externalURL"] == server.url

            assert [line["alert"] for line in server.events("alert fires")] == ["HeadraceEngineDown"]
            assert [line["model"] for line in server.events("alert cleared")] == ["echo"]
            assert server.events("alert webhook failed; it is tried again")
            # The address may be a secret, like the secret itself.
            assert "of-the-receiver" not in server.log
            assert SECRET not in server.log


def test_failing_requests_are_told_of_and_their_end(tmp_path: Path) -> None:
    fine = [chunk("up"), chunk("stream", "stop"), USAGE, DONE]
    broken = Reply([b'{"error": {"message": "out of order"}}'], status=500, kind="application/json")
    with receiving() as receiver, upstream() as app:
        environment = settings(receiver, alert_window=1, breaker="off", retry_budget=0, retry_reserve=0, max_workers=2)
        with RunningServer(tmp_path, app.url, environment=environment) as server:
            app.replies = [broken]

            def failing() -> bool:
                assert ask(server.url).status_code == 502
                # A stream has said 200 by the time that it breaks.
                assert ask(server.url, stream=True, n=1).status_code in (200, 502)
                return bool(receiver.taken)

            eventually(failing, what="an alert")
            fired = receiver.wait_for("HeadraceErrorShareHigh", "firing")
            assert fired["labels"]["model"] == "remote"
            app.replies = [Reply(fine)]

            def fine_again() -> bool:
                # Refused by their callers' fault: they are no errors, and hide none.
                assert ask(server.url, max_tokens=-1).status_code == 400
                assert ask(server.url).status_code == 200
                return len(receiver.taken) > 1

            eventually(fine_again, what="the end of the alert")
            cleared = receiver.wait_for("HeadraceErrorShareHigh", "resolved")
            assert cleared["startsAt"] == fired["startsAt"]
            assert len(receiver.taken) == 2


@contextmanager
def upstream() -> Iterator[Upstream]:
    """A real server elsewhere, in a thread of its own."""
    import asyncio

    app, begun, over = Upstream(), threading.Event(), threading.Event()

    async def live() -> None:
        async with serving(app):
            begun.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert begun.wait(20)
    try:
        yield app
    finally:
        over.set()
        thread.join(20)


def test_long_queues_are_told_of(tmp_path: Path) -> None:
    with receiving() as receiver:
        environment = settings(receiver, alert_window=2, alert_queue_seconds=0.03, max_sequences=1, ttft_target=0, max_queue_wait=86_400)
        with RunningServer(tmp_path, "echo?pace=0.02", environment=environment) as server, ThreadPoolExecutor(4) as pool:

            def busy() -> bool:
                answers = list(pool.map(lambda _: ask(server.url, max_tokens=8), range(4)))
                assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
                return bool(receiver.taken)

            eventually(busy, what="an alert")
            receiver.wait_for("HeadraceQueueTimeHigh", "firing")
            receiver.wait_for("HeadraceQueueTimeHigh", "resolved")
            assert len(receiver.taken) == 2


@pytest.mark.parametrize("place", ["memory", "redis"])
def test_a_budget_that_is_nearly_spent_is_told_of_once(tmp_path: Path, place: str, request: pytest.FixtureRequest) -> None:
    url = "memory://" if place == "memory" else request.getfixturevalue("redis_url")
    with receiving() as receiver:
        environment = settings(receiver, limits_url=url, max_workers=2)
        with RunningServer(tmp_path, "echo", environment=environment) as server:
            record, secret = server.new_key("the shop", budget_tokens=1000, budget_period="total")
            headers = {"Authorization": f"Bearer {secret}"}
            used = 0

            def spend() -> None:
                nonlocal used
                answer = ask(server.url, headers=headers, max_tokens=40)
                assert answer.status_code == 200, answer.text
                used += answer.json()["usage"]["total_tokens"]

            spend()
            while used < 800:
                assert receiver.taken == []
                before = used
                spend()
            fired = receiver.wait_for("HeadraceBudgetNearlySpent", "firing")
            assert before < 800 <= used
            assert fired["labels"]["key"] == record.id
            assert fired["labels"]["key_name"] == "the shop"
            assert fired["labels"]["period"] == "total"
            assert fired["annotations"]["description"].startswith(f"{used} of 1000 tokens are spent")
            for _ in range(4):
                ask(server.url, headers=headers, max_tokens=40)
            assert len(receiver.taken) == 1
