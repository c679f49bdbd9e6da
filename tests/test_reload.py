"""API processes that come and go under load, with real processes: reloads, refused reloads, crashes, stops."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow

WORDS = "abcdefgh" * 3


class Load:
    """Clients that keep their connections and ask again and again; an answer that breaks off, or never comes, is noted."""

    def __init__(self, url: str, clients: int) -> None:
        self._host = url.removeprefix("http://")
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(clients)]
        self.answered = 0
        self.broken: list[str] = []
        self.statuses: set[int] = set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.answered > 20, what="load")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def more(self, answers: int) -> None:
        """Wait for so many further answers."""
        before = self.answered
        eventually(lambda: self.answered >= before + answers, what="further answers")

    def _ask(self, number: int) -> None:
        with contextlib.closing(http.client.HTTPConnection(self._host, timeout=30)) as connection:
            self._ask_on(connection, number)

    def _ask_on(self, connection: http.client.HTTPConnection, number: int) -> None:
        stream = number % 2 == 0
        route = "/chat/stream" if stream else "/chat"
        while not self._over.is_set():
            try:
                if connection.sock is None:
                    connection.connect()
            except ConnectionRefusedError:
                return  # the server is gone, and this request was never taken
            except TimeoutError:
                return
            try:
                connection.request("POST", route, json.dumps({"prompt": WORDS}), {"content-type": "application/json"})
                answer = connection.getresponse()
                body = answer.read().decode()
                self.statuses.add(answer.status)
                if answer.status == 200 and (("event: done" not in body) if stream else json.loads(body)["response"] != WORDS):
                    self.broken.append(f"{route} ended early: {body[-200:]!r}")
                self.answered += 1
            except (OSError, http.client.HTTPException) as error:
                self.broken.append(f"{route}: {error!r}")
                connection.close()


def batches_of_three(url: str, workers: int) -> set[int]:
    """Statuses of a batch of three on new connections, so many that they reach all processes."""
    said = set()
    for _ in range(6 * workers):
        with httpx.Client(base_url=url, trust_env=False) as client:
            said.add(client.post("/chat/batch", json=[{"prompt": "x"}] * 3).status_code)
    return said


def test_a_stop_under_load_resets_nothing_and_loses_no_answer(tmp_path: Path) -> None:
    for round_ in range(2):
        folder = tmp_path / str(round_)
        folder.mkdir()
        with RunningServer(folder, "echo?pace=0.002", "--max-workers", str(1 + round_ % 2)) as server, Load(server.url, 12) as load:
            load.more(20 * round_)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            load.stop()
            assert load.broken == []
            assert load.statuses <= {200, 503}


def test_queued_connections_are_answered_by_a_server_that_stops(tmp_path: Path) -> None:
    with RunningServer(tmp_path) as server:
        api = server.ps()["api"][0]["pid"]
        os.kill(api, signal.SIGSTOP)
        host, port = server.url.removeprefix("http://").split(":")
        queued = [http.client.HTTPConnection(host, int(port), timeout=20) for _ in range(20)]
        for connection in queued:
            connection.request("POST", "/chat", json.dumps({"prompt": "hello"}), {"content-type": "application/json"})
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.events("stopping"))
        os.kill(api, signal.SIGCONT)
        answers = [connection.getresponse() for connection in queued]
        assert [answer.status for answer in answers] == [200] * 20
        assert all(json.loads(answer.read())["response"] == "hello" for answer in answers)
        assert server.process.wait(60) == 0
        for connection in queued:
            connection.close()


def test_not_ready_at_once_but_open_connections_are_served_and_asked_not_to_come_again(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo?pace=0.02") as server:
        with httpx.stream("POST", f"{server.url}/chat/stream", json={"prompt": "a" * 100}, timeout=30) as running:
            pieces = running.iter_raw()
            next(pieces)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: server.events("stopping"))
            ready = eventually(lambda: (said := httpx.get(f"{server.url}/health/ready")).status_code == 503 and said)
            assert ready.headers["connection"] == "close"
            late = eventually(lambda: (said := httpx.post(f"{server.url}/chat", json={"prompt": "x"})).status_code == 503 and said)
            assert late.headers["retry-after"]
            assert b"event: done" in b"".join(pieces)
        assert server.process.wait(60) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_under_load_drops_nothing_and_is_in_force_everywhere(tmp_path: Path, workers: int) -> None:
    (tmp_path / "headrace.toml").write_text("max_batch = 2\n")
    with RunningServer(tmp_path, "echo?pace=0.002", "--max-workers", str(workers)) as server:
        before = {line["pid"] for line in server.ps()["api"]}
        counted = _answers(server)
        assert batches_of_three(server.url, workers) == {422}
        with Load(server.url, 6) as load:
            (tmp_path / "headrace.toml").write_text("max_batch = 3\n")
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: server.events("configuration reloaded"))
            assert server.events("configuration reloaded")[0]["changed"] == ["max_batch"]
            assert batches_of_three(server.url, workers) == {200}
            (tmp_path / "headrace.toml").write_text("max_batch = 4\n")
            answer = httpx.post(f"{server.url}/admin/reload", headers=server.operator(), timeout=30)
            assert (answer.status_code, answer.json()["changed"]) == (200, ["max_batch"])
            load.more(30)
            load.stop()
            assert load.broken == []
            assert load.statuses == {200}
        eventually(lambda: len(_apis(server)) == workers)
        assert not before & {line["pid"] for line in _apis(server)}
        assert server.worker()["restarts"] == 0
        # What processes that are gone have counted stays counted.
        assert _answers(server) >= counted + load.answered


def _apis(server: RunningServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/admin/ps").json()["api"]
    return found


def _answers(server: RunningServer) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    lines = [line for line in text.splitlines() if line.startswith("headrace_requests_total") and 'route="/chat' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("max_batch = 'many'\n", "settings.toml, line 1: max_batch"),
        ("max_batches = 3\n", "did you mean max_batch?"),
        ("max_sequences = 7\nmax_batch = 3\n", "started again for other values of max_sequences"),
        ("deny_output_patterns = ['(']\nmax_batch = 3\n", "("),
        ("degrade_queue = 1\ndegrade_model = 'echo?pace=1'\nmax_batch = 3\n", "degrade_model"),
    ],
)
def test_a_bad_configuration_is_refused_whole(quick: RunningServer, written: str, said: str) -> None:
    file = Path(quick.environment["HEADRACE_CONFIG"])
    apis = [line["pid"] for line in quick.ps()["api"]]
    file.write_text(written)
    answer = httpx.post(f"{quick.url}/admin/reload", headers=quick.operator(), timeout=30)
    assert answer.status_code == 422
    assert said in answer.text
    refused = len(quick.events("configuration refused"))
    quick.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(quick.events("configuration refused")) > refused)
    assert said in quick.events("configuration refused")[-1]["reason"]
    assert [line["pid"] for line in quick.ps()["api"]] == apis
    assert batches_of_three(quick.url, 1) == {422}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("quick")
    file = folder / "settings.toml"
    file.write_text("max_batch = 2\n")
    # As under nohup: what is sent on purpose still has its meaning.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with RunningServer(folder, environment={"HEADRACE_CONFIG": str(file)}) as server:
            yield server
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_web_page_reloads_nothing(quick: RunningServer) -> None:
    page = quick.client.post("/admin/reload", headers={"Origin": "https://example.org"})
    assert page.status_code == 403


def test_one_of_two_api_processes_dies_and_only_its_requests_are_hurt(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo?pace=0.002", "--max-workers", "2") as server, Load(server.url, 8) as load:
        dead = _apis(server)[0]["pid"]
        os.kill(dead, signal.SIGKILL)

        def replaced() -> bool:
            try:
                apis = _apis(server)
            except httpx.TransportError:
                return False
            return len(apis) == 2 and all(line["state"] == "ready" and line["pid"] != dead for line in apis)

        eventually(replaced)
        hurt = len(load.broken)
        load.more(50)
        # A client has at most one request under way.
        assert hurt <= 8
        assert len(load.broken) == hurt
        load.stop()


def test_a_reload_lets_long_streams_go_on(tmp_path: Path) -> None:
    with (
        RunningServer(tmp_path, "echo?pace=0.02", "--drain-timeout", "0.1") as server,
        httpx.stream("POST", f"{server.url}/chat/stream", json={"prompt": "a" * 120}, timeout=60) as running,
    ):
        pieces = running.iter_raw()
        next(pieces)
        # It waits for no stream, and ends none, whatever time a stop would give it.
        assert httpx.post(f"{server.url}/admin/reload", headers=server.operator(), timeout=60).status_code == 200
        assert b"event: done" in b"".join(pieces)
