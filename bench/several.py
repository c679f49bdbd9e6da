"""Servers of several models, and users who ask them, for the benchmarks of loading and upgrading."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from bench.servers import Server, headrace
from headrace.cli.target import target


@contextmanager
def fleet(toml: str) -> Iterator[Server]:
    """A server of the models in `toml`. Raises `ServerFailed`."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder) / "headrace.toml"
        file.write_text(toml)
        with headrace(environment={"HEADRACE_CONFIG": str(file)}) as server:
            yield server


@dataclass
class Users:
    """So many who ask one thing after another, each with `ask(client, number)`, which returns tokens or raises."""

    url: str
    count: int
    ask: Callable[[httpx.Client, int], int]
    patience: float = 60.0
    answered: int = 0
    tokens: int = 0
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Users:
        self._over, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._use, args=(number,), daemon=True) for number in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self.patience)

    def more(self, answers: int) -> None:
        """Returns after so many further answers."""
        goal, end = self.answered + answers, time.monotonic() + self.patience
        while self.answered < goal and time.monotonic() < end:
            time.sleep(0.01)

    def _use(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=self.patience, trust_env=False) as client:
            while not self._over.is_set():
                try:
                    tokens = self.ask(client, number)
                    with self._lock:
                        self.tokens += tokens
                        self.answered += 1
                except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}"[:300])


def operator(url: str, patience: float) -> httpx.Client:
    """A client that shows the server's operator's pass where it administers."""
    client = target(url, None).client(timeout=patience)
    client.base_url = httpx.URL(url)
    return client


def listing(client: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/admin/models").raise_for_status().json()
    return found
