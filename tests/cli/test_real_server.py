"""The client commands against a whole server, with the engine that needs no model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.command_line import Cli, clean_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-m", "headrace", "serve", "echo", "--port", "0"]
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=folder, env=clean_environment(folder))
    try:
        yield wait_until_ready(process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], log: Path) -> str:
    """The server's URL, from the line that says it is ready."""
    for _ in range(600):
        for line in log.read_text().splitlines():
            if '"event":"ready"' in line:
                return str(json.loads(line)["url"])
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(log.read_text())


def test_chat_gets_its_words_back(cli: Cli, server: str) -> None:
    done = cli("chat", "--url", server, stdin="Good morning\nGood night\n")
    assert (done.returncode, done.stdout) == (0, "Good morning\nGood night\n"), done.stderr


@pytest.mark.parametrize("route", [(), ("--native",), ("--ignore-eos",)])
def test_bench(cli: Cli, server: str, route: tuple[str, ...]) -> None:
    done = cli("bench", server, "--users", "4", "--requests", "12", "--max-tokens", "16", "--json", *route)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["requests"], said["errors"], said["output_tokens"]) == (12, 0, 12 * 16)
    assert said["prompt_tokens"] > 12 * 50
    assert said["ttft"]["p50"] > 0


def test_ps_shows_a_living_worker(cli: Cli, server: str) -> None:
    done = cli("ps", "--json", "--url", server)
    assert done.returncode == 0, done.stderr
    worker = json.loads(done.stdout)["workers"][0]
    assert set(worker) == {"pid", "model", "state", "restarts", "running", "waiting", "memory_mib"}
    assert (worker["model"], worker["state"], worker["restarts"]) == ("echo", "ready", 0)
    assert Path(f"/proc/{worker['pid']}").exists()
    assert "echo" in cli("ps", "--url", server).stdout


def test_a_taken_port_is_one_message(cli: Cli, server: str) -> None:
    done = cli("serve", "echo", "--port", server.rpartition(":")[2])
    assert done.returncode == 2
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr
