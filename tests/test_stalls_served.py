"""Stalls and standbys of whole servers: what their clients, probes and operators see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def test_a_standby_for_a_remote_engine_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headrace", "serve", "http://127.0.0.1:9/v1", "--port", "0"]
    environment = RunningServer(tmp_path).environment | {"HEADRACE_STANDBY": "true"}
    refused = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=tmp_path, env=environment, check=False)
    assert refused.returncode != 0
    assert "standby = true makes no sense" in refused.stderr
