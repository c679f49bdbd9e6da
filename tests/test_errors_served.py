"""Errors of a running server: processes that die, a database that is away; read with and without the server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from headrace.records import TrackedError
from headrace.stores.database import Database
from headrace.stores.errors_sql import SqlErrors
from real_servers import PostgresServer
from running_server import RunningServer, eventually

pytestmark = pytest.mark.slow


def errors(server: RunningServer, folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "headrace", "errors", *words]
    done = subprocess.run(command, env=server.environment | {"COLUMNS": "200"}, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def listed(server: RunningServer, folder: Path, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(errors(server, folder, "--json", *words))["errors"]
    return found


def quickly(url: str) -> dict[tuple[str, str], TrackedError]:
    """What the command would show, without its start."""

    async def read() -> list[TrackedError]:
        database = Database(url)
        try:
            return await SqlErrors(database).newest(limit=100)
        finally:
            await database.close()

    return {(error.code, error.process): error for error in asyncio.run(read())}


DEATHS = {("process ended", "engine"), ("process ended", "API process")}


def test_what_died_is_listed_and_survives_the_server(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/data/headrace.db"
    with RunningServer(tmp_path, "echo", environment={"MAX_WORKERS": "2"}) as server:
        assert errors(server, tmp_path) == "No errors.\n"
        os.kill(server.worker()["pid"], signal.SIGKILL)
        os.kill(server.ps()["api"][0]["pid"], signal.SIGKILL)
        eventually(lambda: quickly(url).keys() >= DEATHS, what="both deaths in the list")
        found = {error["fingerprint"]: error for error in listed(server, tmp_path) if (error["code"], error["process"]) in DEATHS}
        assert len(found) == 2
        assert all("SIGKILL" in error["detail"] for error in found.values())
    shown = errors(server, tmp_path, "--limit", "1")
    assert shown.splitlines()[0].split()[:3] == ["COUNT", "LAST", "SEEN,"]
    assert shown.count("process ended") <= 1
    assert errors(server, tmp_path, "--since", "2099-01-01") == "No errors since then.\n"
    # The same again, by another server: one more of the same kind.
    before = quickly(url)["process ended", "engine"]
    with RunningServer(tmp_path, "echo") as again:
        os.kill(again.worker()["pid"], signal.SIGKILL)
        eventually(lambda: quickly(url)["process ended", "engine"].count > before.count, what="a higher count")
        assert quickly(url)["process ended", "engine"].first_seen == before.first_seen


def test_errors_wait_in_memory_while_the_database_is_away(tmp_path: Path) -> None:
    with PostgresServer() as postgres, RunningServer(tmp_path, "echo", environment={"HEADRACE_DATABASE_URL": postgres.url}) as server:
        assert server.client.post("/chat", json={"prompt": "hi"}).status_code == 200
        postgres.stop()
        os.kill(server.worker()["pid"], signal.SIGKILL)
        eventually(lambda: "process ended" in server.log, what="the engine's death")
        server.worker()
        # A known way on: what can't be billed in the database is billed in the journal.
        assert server.client.post("/chat", json={"prompt": "hi"}).status_code == 200
        eventually(lambda: "headrace_ledger_away 1.0" in server.client.get("/metrics").text, what="the gauge")
        postgres.start()
        wanted = {("process ended", "engine"), ("database away: usage goes to the journal", "api")}
        eventually(lambda: quickly(postgres.url).keys() >= wanted, what="both in the list")
        eventually(lambda: "headrace_ledger_away 0.0" in server.client.get("/metrics").text, what="the gauge's way back")
