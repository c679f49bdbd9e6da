"""Stalls and standbys of whole servers: what their clients, probes and operators see."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow


def deaths(server: RunningServer) -> dict[str, float]:
    """Of `/metrics`, by reason."""
    lines = [line for line in server.client.get("/metrics").text.splitlines() if line.startswith("headrace_engine_deaths_total{")]
    return {line.partition('reason="')[2].partition('"')[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_a_stopped_worker_is_replaced_and_the_metrics_say_why(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo", environment={"HEADRACE_STALL_TIMEOUT": "1"}) as server:
        first = server.worker()["pid"]
        os.kill(first, signal.SIGSTOP)
        assert server.client.post("/chat", json={"prompt": "hello"}).json()["response"] == "hello"
        second = server.worker()
        assert second["pid"] != first
        assert second["restarts"] == 1
        assert deaths(server) == {"killed": 0, "stalled": 1, "exited": 0}
        os.kill(second["pid"], signal.SIGKILL)
        assert server.client.post("/chat", json={"prompt": "hello"}).json()["response"] == "hello"
        assert deaths(server) == {"killed": 1, "stalled": 1, "exited": 0}


def test_a_supervisor_that_was_stopped_blames_nobody(tmp_path: Path) -> None:
    with RunningServer(tmp_path, "echo", environment={"HEADRACE_STALL_TIMEOUT": "1"}) as server:
        before = server.worker()["pid"]
        server.process.send_signal(signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            assert server.client.post("/chat", json={"prompt": "hello"}).json()["response"] == "hello"
        server.process.send_signal(signal.SIGCONT)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            assert server.worker()["pid"] == before
        assert deaths(server) == {"killed": 0, "stalled": 0, "exited": 0}


def test_a_standby_is_listed_takes_over_and_readiness_comes_back(tmp_path: Path) -> None:
    # An engine that takes long to load: whoever answers soon after a death was there before it.
    with RunningServer(tmp_path, "echo?load=1.5", environment={"HEADRACE_STANDBY": "true"}) as server:
        workers = eventually(lambda: len(found := server.ps()["workers"]) == 2 and found[1]["state"] == "standby" and found)
        assert [worker["state"] for worker in workers] == ["ready", "standby"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        assert server.client.post("/chat", json={"prompt": "hello"}).json()["response"] == "hello"
        now = server.worker()
        assert (now["pid"], now["restarts"]) == (workers[1]["pid"], 1)
        # Whichever comes first of the supervisor's word and the end of the connection, it ends with the truth.
        eventually(lambda: server.client.get("/health/ready").status_code == 200, within=1.0)


def test_giving_up_ends_streams_says_why_and_isnt_for_good(tmp_path: Path) -> None:
    give_up = {"HEADRACE_GIVE_UP_AFTER": "2", "HEADRACE_STALL_TIMEOUT": "1"}
    with RunningServer(tmp_path, "echo?load=0.5&pace=0.02", environment=give_up) as server:
        said: list[str] = []

        def stream() -> None:
            with httpx.stream("POST", f"{server.url}/chat/stream", json={"prompt": "ab" * 500, "max_length": 4000}, timeout=60) as answer:
                said.extend(line for line in answer.iter_lines() if line)

        client = threading.Thread(target=stream, daemon=True)
        client.start()
        eventually(lambda: server.worker()["running"] == 1)

        def gave_up() -> str:
            for worker in server.ps()["workers"]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker["pid"], signal.SIGKILL)
            answer = server.client.get("/health/ready")
            reason = answer.json().get("reason", "")
            assert answer.status_code == 503 or not reason
            return reason if "could not be brought back" in reason else ""

        assert "within 2 s; it is still tried" in eventually(gave_up)
        client.join(10)
        assert "event: error" in said[-2]
        assert json.loads(said[-1].removeprefix("data: "))["code"] == "engine_unavailable"
        refused = server.client.post("/chat", json={"prompt": "hello"})
        if refused.status_code != 200:  # it may have recovered by now
            assert refused.status_code == 503
            assert "engine_unavailable" in refused.text
        eventually(lambda: server.client.get("/health/ready").status_code == 200)
        assert server.client.post("/chat", json={"prompt": "hello"}).json()["response"] == "hello"


def test_a_standby_for_a_remote_engine_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "serve", "http://127.0.0.1:9/v1", "--port", "0"]
    environment = RunningServer(tmp_path).environment | {"HEADRACE_STANDBY": "true"}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environment, check=False)
    assert refused.returncode != 0
    assert "standby = true makes no sense" in refused.stderr
