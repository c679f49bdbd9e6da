"""SIGTERM at 80 % load, again and again: connections that were reset, and answers that never came or broke off.

The echo engine with a fixed pace has a known capacity, of which the arrivals take a share, at random moments, on connections
that are kept and used again; half of the requests are streams. At a random moment the server is told to stop, while requests go
on arriving until no new connection is made any more. Whoever was connected has to get a whole answer: of the model, or a 503
that says when to come back.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import random
import select
import signal
import subprocess
import threading
import time
from collections import Counter

from bench.figures import Figure, Findings, Side
from bench.servers import ServerFailed, headrace

PACE = 0.01
SEQUENCES = 8
PROMPT = "abcdefgh" * 3
CLIENTS = 48
PATIENCE = 30.0


def run(*, stops: int = 50, load: float = 0.8, workers: int = 1, seed: int = 1) -> Findings:
    """`load`: arrivals as a share of the engine's capacity. `workers`: API processes."""
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    broken: list[str] = []
    slowest = 0.0
    for _ in range(stops):
        with headrace(f"echo?pace={PACE}", "--max-sequences", str(SEQUENCES), "--max-workers", str(workers), may_end=True) as server:
            clients = _Clients(server.url.removeprefix("http://"), load * SEQUENCES / (len(PROMPT) * PACE), draw)
            clients.start()
            time.sleep(draw.uniform(1.0, 2.0))
            told = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            try:
                status = server.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                raise ServerFailed(f"The server did not end within {PATIENCE:g} s.") from None
            slowest = max(slowest, time.monotonic() - told)
            clients.stop()
            if status:
                raise ServerFailed(f"The server ended with status {status}.")
            seen += clients.seen
            broken += clients.broken
    lost = float(len(broken))
    notes = (
        f"{stops} stops at {load:.0%} load: {seen['200']} whole answers, {seen['503']} refused while it stopped,"
        f" {seen['no connection']} found no server any more. The slowest stop took {slowest:.1f} s.",
        *broken[:5],
    )
    figure = Figure("resets and lost answers", lost, 0.0, "at most", "requests", (Side("lost", (lost,), "requests"),))
    return Findings(f"SIGTERM at {load:.0%} load, {stops} times", (figure,), notes)


class _Clients:
    """Requests that arrive whether or not earlier ones are done."""

    def __init__(self, host: str, rate: float, draw: random.Random) -> None:
        self._host = host
        self._rate = rate
        self._draw = draw
        self._due: queue.SimpleQueue[bool | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._serve_arrivals, daemon=True) for _ in range(CLIENTS)]
        self._arrivals = threading.Thread(target=self._arrive, daemon=True)
        self._lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.broken: list[str] = []

    def start(self) -> None:
        for thread in (*self._threads, self._arrivals):
            thread.start()

    def stop(self) -> None:
        self._over.set()
        self._arrivals.join()
        for _ in self._threads:
            self._due.put(None)
        for thread in self._threads:
            thread.join(PATIENCE)

    def _arrive(self) -> None:
        while not self._over.wait(self._draw.expovariate(self._rate)):
            self._due.put(self._draw.random() < 0.5)

    def _serve_arrivals(self) -> None:
        with contextlib.closing(http.client.HTTPConnection(self._host, timeout=PATIENCE)) as connection:
            while (stream := self._due.get()) is not None:
                what, why = self._ask(connection, stream)
                with self._lock:
                    self.seen[what] += 1
                    if why:
                        self.broken.append(why)

    def _ask(self, connection: http.client.HTTPConnection, stream: bool) -> tuple[str, str]:
        """What came of it, and how it broke."""
        try:
            if connection.sock is not None and select.select([connection.sock], [], [], 0)[0]:
                # The server has closed it while nothing was asked; any client with a pool looks.
                connection.close()
            if connection.sock is None:
                connection.connect()
        except OSError:
            return "no connection", ""
        route = "/chat/stream" if stream else "/chat"
        try:
            connection.request("POST", route, json.dumps({"prompt": PROMPT}), {"content-type": "application/json"})
            answer = connection.getresponse()
            body = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            return "broken", f"{route}: {error!r}"
        if answer.status == 200 and (("event: done" not in body) if stream else json.loads(body).get("response") != PROMPT):
            return "broken", f"{route} ended early: {body[-200:]!r}"
        if answer.status not in (200, 503):
            return "broken", f"{route}: status {answer.status}: {body[-200:]}"
        return str(answer.status), ""
