"""A whole server in processes of its own, for tests: `with RunningServer("echo") as server`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx

from headrace.config import StoreSection
from headrace.policies.key_desk import KeyDesk
from headrace.policies.mint import Actor, Wish
from headrace.policies.operator_pass import operator_pass
from headrace.records import KeyRecord
from headrace.stores.opening import open_stores
from headrace.stores.sql_keys import SqlKeys

T = TypeVar("T")


def eventually(found: Callable[[], T], *, within: float = 20.0, what: str = "the condition") -> T:
    """Poll until `found()` is true; its value."""
    end = time.monotonic() + within
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < end, f"{what} did not come about within {within} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class RunningServer:
    def __init__(self, folder: Path, model: str = "echo", *flags: str, environment: dict[str, str] | None = None) -> None:
        self._log = folder / "server.log"
        outside = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_") and name != "API_PORT"}
        # Tests ask the same thing again and again, and want it done again.
        ours = {"HEADRACE_DATA_DIR": str(folder / "data"), "HEADRACE_RESPONSE_CACHE": "off"}
        self.environment = outside | ours | (environment or {})
        self._command = [sys.executable, "-m", "headrace", "serve", model, "--port", "0", *flags]
        self._folder = folder
        self.process: subprocess.Popen[bytes]
        self.url = ""
        self.client: httpx.Client

    def __enter__(self) -> Self:
        self.start()
        try:
            self.url = eventually(self._ready_url, within=90, what="readiness")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=30, trust_env=False, event_hooks={"request": [self._show_pass]})
        return self

    def operator(self) -> dict[str, str]:
        """The headers of the operator's own commands."""
        pepper = (Path(self.environment["HEADRACE_DATA_DIR"]) / "pepper").read_bytes()
        return {"Authorization": f"Bearer {operator_pass(pepper, time.time())}"}

    def new_key(self, name: str = "test", **wish: Any) -> tuple[KeyRecord, str]:
        """Record and secret, made as `headrace keys create` makes them, without that command's second. `wish`: fields of `Wish`."""
        names = {"data_dir": "HEADRACE_DATA_DIR", "database_url": "HEADRACE_DATABASE_URL"}
        store = StoreSection.model_validate({field: self.environment[name] for field, name in names.items() if name in self.environment})

        async def create() -> tuple[KeyRecord, str]:
            database, pepper = open_stores(store)
            try:
                keys = SqlKeys(database)
                return await KeyDesk(keys, keys, pepper).create(Wish(name=name, **wish), Actor("cli:tests"))
            finally:
                await database.close()

        return asyncio.run(create())

    def _show_pass(self, request: httpx.Request) -> None:
        if (
            request.url.path.startswith(("/admin/cache", "/admin/models", "/admin/reload", "/admin/usage"))
            and "authorization" not in request.headers
        ):
            request.headers.update(self.operator())

    def start(self) -> None:
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder, env=self.environment)

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of that event."""
        lines = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def _ready_url(self) -> str:
        assert self.process.poll() is None, self.log
        return next((line["url"] for line in self.events("ready")), "")

    def ps(self) -> dict[str, Any]:
        said: dict[str, Any] = self.client.get("/admin/ps").raise_for_status().json()
        return said

    def worker(self) -> dict[str, Any]:
        """The one engine worker, once there is one that is ready."""
        return eventually(
            lambda: next((worker for worker in self.ps()["workers"] if worker["state"] == "ready"), {}), what="a ready worker"
        )

    def children(self) -> list[int]:
        listing = self.ps()
        return [line["pid"] for line in (*listing["workers"], *listing["api"])]
