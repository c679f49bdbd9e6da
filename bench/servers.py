"""Servers under test, as subprocesses on free ports: started, awaited, and stopped again, or an error that shows their last words."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

BUILD = Path(__file__).with_name(".build")
_OURS = ("HEADRACE_", "MODEL_PATH", "API_PORT", "MAX_WORKERS", "LOG_LEVEL")
_POLL = 0.01
"""Seconds between questions while a server starts; also the resolution of start times."""


class ServerFailed(Exception):
    """A side could not be started, or died; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answered its readiness probe."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path
    start_seconds: float
    """From the start of the process to the first 200 of its readiness probe."""

    def check(self) -> None:
        """Raises `ServerFailed` if the server has died."""
        if self.process.poll() is not None:
            raise ServerFailed(f"{self.name} ended with status {self.process.returncode}.\n{_tail(self.log)}")

    def cpu_seconds(self) -> float:
        """User and system time of the process and its living descendants."""
        return sum(cpu_seconds(pid) for pid in [self.process.pid, *self.descendants()])

    def descendants(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


@contextmanager
def headrace(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
    may_end: bool = False,
    python: str = sys.executable,
) -> Iterator[Server]:
    """`headrace serve ARGUMENTS` on a free port, with no configuration but this, and no answer twice.

    Raises `ServerFailed`, also if the server has ended by itself, unless it `may_end`.
    """
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        command = [python, "-m", "headrace", "serve", *arguments, "--port", str(port)]
        ours = {"HEADRACE_LOG_LEVEL": "warning", "HEADRACE_RESPONSE_CACHE": "off", "HEADRACE_DATA_DIR": f"{folder}/data"}
        clean = clean_environment() | ours | dict(environment or {})
        # An empty folder, so that no .env and no headrace.toml is found.
        with running("headrace", command, port, "/health/ready", clean, Path(folder), timeout, may_end) as server:
            yield server


@contextmanager
def llama_server(gguf: Path, *, binary: str | None, threads: int, slots: int, context: int, timeout: float = 120.0) -> Iterator[Server]:
    """`llama-server` over a GGUF file on a free port. `context` is shared by all slots. Raises `ServerFailed`."""
    port = free_port()
    program = find_llama_server(binary)
    words = {"-m": gguf, "--host": "127.0.0.1", "--port": port, "-t": threads, "-np": slots, "-c": context}
    command = [str(program), *(str(word) for pair in words.items() for word in pair)]
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        running("llama-server", command, port, "/health", dict(os.environ), Path(folder), timeout) as server,
    ):
        yield server


@contextmanager
def transformers_serve(folder: Path, *, timeout: float = 300.0) -> Iterator[Server]:
    """`transformers serve --continuous-batching` over a folder of weights, on a free port. Raises `ServerFailed`."""
    port = free_port()
    program = Path(sys.executable).with_name("transformers")
    if not program.is_file():
        raise ServerFailed("There is no `transformers` beside this Python: pip install 'headrace[transformers]'.")
    command = [
        str(program),
        "serve",
        str(folder),
        "--continuous-batching",
        "--cb-block-size",
        "32",
        "--cb-num-blocks",
        "1024",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as log,
        running("transformers serve", command, port, "/health", environment, Path(log), timeout) as server,
    ):
        yield server


@contextmanager
def vllm_serve(folder: Path, *, python: str, kv_bytes: int, timeout: float = 600.0) -> Iterator[Server]:
    """vLLM's own server over a folder of weights, on a free port, as it comes but for the memory it takes. Raises `ServerFailed`."""
    port = free_port()
    words = {"--model": folder, "--host": "127.0.0.1", "--port": port, "--kv-cache-memory-bytes": kv_bytes}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *(str(word) for pair in words.items() for word in pair)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as log,
        running("vllm serve", command, port, "/health", environment, Path(log), timeout) as server,
    ):
        yield server


def find_llama_server(binary: str | None) -> Path:
    """The one named, or the one that bench/peers/build_llama_server.sh made, or the one on the PATH. Raises `ServerFailed`."""
    found = binary or (str(BUILD / "llama-server") if (BUILD / "llama-server").exists() else shutil.which("llama-server"))
    if found is None or not Path(found).is_file():
        raise ServerFailed("There is no llama-server: run bench/peers/build_llama_server.sh, or give --llama-server-file FILE.")
    return Path(found).absolute()


def clean_environment() -> dict[str, str]:
    """This process's environment without Headrace's variables, but for the folder that holds the models."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    for name in ("HEADRACE_CACHE", "HEADRACE_CACHE_DIR"):
        if name in os.environ:
            kept[name] = os.environ[name]
    return kept


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    port: int,
    probe: str,
    environment: Mapping[str, str],
    folder: Path,
    timeout: float,
    may_end: bool = False,
) -> Iterator[Server]:
    log = folder / "log"
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=folder)
    try:
        _await_ready(name, process, port, probe, started + timeout, log)
        server = Server(name, f"http://127.0.0.1:{port}", process, log, time.perf_counter() - started)
        yield server
        if not may_end:
            server.check()
    finally:
        _stop(process)


def _await_ready(name: str, process: subprocess.Popen[bytes], port: int, probe: str, until: float, log: Path) -> None:
    while time.perf_counter() < until:
        if process.poll() is not None:
            raise ServerFailed(f"{name} ended with status {process.returncode} before it was ready.\n{_tail(log)}")
        if _answers(port, probe):
            return
        time.sleep(_POLL)
    raise ServerFailed(f"{name} was not ready in time.\n{_tail(log)}")


def _answers(port: int, probe: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", probe)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
    process.wait()


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join("  | " + line for line in log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""
