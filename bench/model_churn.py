"""Random loads, unloads and requests over six models in a budget for three: deadlocks, overshoots, answers of the wrong model.

Five models, or six, are echoes that take memory as weights would and say who they are; with `real` the first is the demonstration model.
A watcher looks at what the server has promised, and at what its workers really have in memory, all the time.
"""

from __future__ import annotations

import random
import threading
import time

import httpx

from bench.figures import Figure, Findings, Side
from bench.servers import Server
from bench.several import fleet, listing, operator

NAMES = ("ada", "bea", "cyd", "dot", "eve", "fay")
PATIENCE = 120.0
"""Seconds after which something that isn't answered is taken for a deadlock; a load takes one or two."""


def run(*, operations: int = 500, users: int = 6, seed: int = 1, memory: int = 192, real: int = 1) -> Findings:
    """`memory`: MiB of each echo. `real`: 1 is with the demonstration model among the six."""
    each = memory + 64
    sections = [f'[models.{name}]\nmodel = "echo?says={name}&memory={memory}"\n' for name in NAMES]
    budget = 3 * each
    if real:
        # It counts for as much as an echo, and takes a little more than twice: the budget is for both.
        sections[0] = f'[models.{NAMES[0]}]\nmodel = "smollm2-135m-instruct"\nkv_cache_gib = 0.2\n'
        budget = 720 + 2 * each
    toml = f"memory_budget_gib = {budget / 1024}\nmodel = '{NAMES[1]}'\nlog_level = 'error'\n" + "".join(sections)
    with fleet(toml) as server:
        churn = Churn(server, operations, seed, real=bool(real))
        churn.go(users)
    return churn.findings()


class Churn:
    def __init__(self, server: Server, operations: int, seed: int, *, real: bool) -> None:
        self._server = server
        self._left = operations
        self._random = random.Random(seed)
        self._real = real
        self._lock = threading.Lock()
        self._over = threading.Event()
        self.counts: dict[str, int] = {}
        self.deadlocks: list[str] = []
        self.wrong: list[str] = []
        self.broken: list[str] = []
        self.promised = self.resident = 0.0
        """The most, as a part of the budget."""

    def go(self, users: int) -> None:
        watcher = threading.Thread(target=self._watch, daemon=True)
        threads = [threading.Thread(target=self._use, daemon=True) for _ in range(users)]
        for thread in (watcher, *threads):
            thread.start()
        for thread in threads:
            thread.join()
        self._over.set()
        watcher.join()

    def _use(self) -> None:
        with operator(self._server.url, PATIENCE) as client:
            while True:
                with self._lock:
                    if not self._left:
                        return
                    self._left -= 1
                    kind = self._random.choices(("ask", "load", "unload"), (6, 2, 2))[0]
                    name = self._random.choice(NAMES)
                try:
                    self._do(client, kind, name)
                except httpx.TimeoutException:
                    self.deadlocks.append(f"{kind} {name}")
                except httpx.HTTPError as error:
                    self.broken.append(f"{kind} {name}: {error!r}")

    def _do(self, client: httpx.Client, kind: str, name: str) -> None:
        if kind != "ask":
            answer = client.post(f"/admin/models/{name}/{kind}")
            self._count(kind, answer)
            if answer.status_code not in (200, 409):
                self.broken.append(f"{kind} {name}: {answer.status_code} {answer.text[:200]}")
            return
        words = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0}
        answer = client.post("/v1/chat/completions", json=words)
        self._count(kind, answer)
        if answer.status_code != 200:
            self.broken.append(f"{kind} {name}: {answer.status_code} {answer.text[:200]}")
            return
        said, by = answer.json()["choices"][0]["message"]["content"], answer.json()["model"]
        right = said not in NAMES and bool(said) if self._real and name == NAMES[0] else said == name
        if not right or by != name:
            self.wrong.append(f"{name}: {by} said {said!r}")

    def _count(self, kind: str, answer: httpx.Response) -> None:
        with self._lock:
            key = f"{kind} {answer.status_code}"
            self.counts[key] = self.counts.get(key, 0) + 1

    def _watch(self) -> None:
        with operator(self._server.url, PATIENCE) as client:
            while not self._over.is_set():
                said = listing(client)
                memory = said["memory"]["ram"]
                self.promised = max(self.promised, memory["held"] / memory["budget"])
                resident = 2**20 * sum(model["resident_mib"] for model in said["models"])
                self.resident = max(self.resident, resident / memory["budget"])
                time.sleep(0.05)

    def findings(self) -> Findings:
        done = ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))
        overshoots = float(self.promised > 1) + float(self.resident > 1)
        return Findings(
            title="Models that come and go",
            figures=(
                Figure("deadlocks", len(self.deadlocks), 0, "at most", ""),
                Figure("overshoots of the budget", overshoots, 0, "at most", ""),
                Figure("answers of the wrong model", len(self.wrong), 0, "at most", ""),
                Figure("requests that failed", len(self.broken), 0, "at most", ""),
                Figure("most memory promised, part of the budget", self.promised, sides=(Side("really in memory", (self.resident,), "×"),)),
            ),
            notes=(f"Done, by what and status: {done}.", *self.deadlocks[:3], *self.wrong[:3], *self.broken[:3]),
        )
