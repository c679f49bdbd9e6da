from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cli.command_line import Cli, QuickCli, clean_environment
from cli.protocol_server import ProtocolServer


@pytest.fixture
def protocol_server() -> Iterator[ProtocolServer]:
    app = ProtocolServer()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
    sock = server.config.bind_socket()
    sock.listen(128)  # who comes before uvicorn does waits
    app.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    yield app
    app.hold.set()
    server.should_exit = True
    thread.join(10)
    sock.close()
    assert not thread.is_alive()


@pytest.fixture
def clean_env(tmp_path: Path) -> dict[str, str]:
    return clean_environment(tmp_path)


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs `headrace` in an empty folder."""
    return Cli(tmp_path)


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> QuickCli:
    """Runs `headrace` in an empty folder, in this process."""
    return QuickCli(tmp_path, monkeypatch, capsys)
