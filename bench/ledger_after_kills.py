"""The ledger against the engine after kills at random moments: API process, engine worker, supervisor, under load.

Streams of the echo engine run all the time, and one in five hangs up. A round kills API processes, then workers, then
the supervisor, which is started again. What the engine produced is known independently of the ledger in three ways: a
worker's own total, where only API processes were killed since it started; its counters, read while it is stopped, just
before it is killed; and what the clients of finished streams were told.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec

from bench.figures import Figure, Findings, Side
from bench.servers import ServerFailed
from headrace.engine.frames import FromWorker, Stats, StatsRequest
from headrace.stores.slots import LeftSlots
from headrace.types import EngineStats

PATIENCE = 30.0


def run(
    *,
    kills: int = 200,
    apis: int = 5,
    workers: int = 3,
    users: int = 8,
    pace: float = 0.004,
    seed: int = 1,
    settled_within: float = 20.0,
) -> Findings:
    """`kills`: how many in all; `apis`, `workers`: of these for each supervisor. `pace`: seconds of a step."""
    with tempfile.TemporaryDirectory(prefix="hr-") as folder:
        return Kills(Path(folder), users, pace, random.Random(seed), settled_within).run(kills, apis, workers)


@dataclass
class Asked:
    """One request, as its client saw it."""

    id: str = ""
    characters: int = 0
    """Received; the echo engine's tokens are bytes."""
    told: int | None = None
    """Prompt and completion, where the stream came to its end."""
    hung_up: bool = False


@dataclass
class Found:
    """Tokens by which the ledger and what we know differ, by how we know it."""

    totals: int = 0
    counters: int = 0
    told: int = 0
    less_than_received: int = 0
    overshoot: int = 0
    """Most that a hang-up was billed beyond what its client had read."""
    compared: dict[str, int] = field(default_factory=lambda: {"totals": 0, "counters": 0, "told": 0, "broken": 0})


class Kills:
    def __init__(self, folder: Path, users: int, pace: float, draw: random.Random, settled_within: float) -> None:
        self._folder = folder
        self._users = users
        self._pace = pace
        self._draw = draw
        self._settled_within = settled_within
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._asked: list[Asked] = []
        self._snapshots: dict[str, int] = {}
        self.found = Found()

    def run(self, kills: int, apis: int, workers: int) -> Findings:
        done = {"API process": 0, "worker": 0, "supervisor": 0}
        try:
            while sum(done.values()) < kills:
                self._start()
                with self._load():
                    for _ in range(min(apis, kills - sum(done.values()))):
                        self._kill_api()
                        done["API process"] += 1
                self._compare_totals()
                with self._load():
                    for _ in range(min(workers, kills - sum(done.values()))):
                        self._kill_worker()
                        done["worker"] += 1
                    if sum(done.values()) < kills:
                        self._kill_supervisor()
                        done["supervisor"] += 1
                        self._start()
                self._settled()
                self._stop()
            self._compare_requests()
        finally:
            self._stop(hard=True)
        found = self.found
        difference = found.totals + found.counters + found.told + found.less_than_received
        notes = (
            f"{', '.join(f'{count} × {name}' for name, count in done.items())} killed; {len(self._asked)} requests.",
            f"Compared: {found.compared}. The most that a hang-up was billed beyond what its client had read: {found.overshoot} tokens.",
        )
        sides = (Side("difference", (float(difference),), "tokens"),)
        return Findings(
            f"The ledger after {kills} kills", (Figure("ledger against engine", float(difference), 0.0, "at most", "tokens", sides),), notes
        )

    # The server

    def _start(self) -> None:
        if self._process is not None:
            return
        runtime = self._folder / "run"
        runtime.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_")}
        environment |= {
            "HEADRACE_DATA_DIR": str(self._folder / "data"),
            "XDG_RUNTIME_DIR": str(runtime),
            "HEADRACE_RESPONSE_CACHE": "off",
            "HEADRACE_DRAIN_TIMEOUT": "5",
        }
        log = self._folder / "log"
        command = [sys.executable, "-m", "headrace", "serve", f"echo?pace={self._pace}", "--port", "0"]
        with log.open("wb") as out:
            self._process = subprocess.Popen(command, stdout=out, stderr=out, cwd=self._folder, env=environment)
        self._url = self._until(lambda: self._logged_url(log), "the server to be ready")

    def _logged_url(self, log: Path) -> str:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerFailed(log.read_text()[-2000:])
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        return next((line["url"] for line in lines if line.get("event") == "ready"), "")

    def _stop(self, *, hard: bool = False) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _pid(self, kind: str) -> int:
        def find() -> int:
            try:
                listed = httpx.get(f"{self._url}/admin/ps", trust_env=False, timeout=5).json()
            except (httpx.HTTPError, ValueError):
                return 0
            return next((int(line["pid"]) for line in listed.get(kind, ()) if line["state"] == "ready"), 0)

        return self._until(find, f"a {kind} process that is ready")

    def _until(self, found: Callable[[], Any], what: str, within: float = PATIENCE) -> Any:
        end = time.monotonic() + within
        while not (value := found()):
            if time.monotonic() > end:
                raise ServerFailed(f"Waited {within:g} s for {what}.")
            time.sleep(0.01)
        return value

    # Kills

    def _moment(self) -> None:
        time.sleep(self._draw.uniform(0.02, 0.5))

    def _kill_api(self) -> None:
        pid = self._pid("api")
        self._moment()
        os.kill(pid, signal.SIGKILL)

    def _kill_worker(self) -> None:
        pid = self._pid("workers")
        self._moment()
        self._freeze(pid)
        os.kill(pid, signal.SIGKILL)
        self._until(lambda: self._pid("workers") != pid, "another worker")

    def _kill_supervisor(self) -> None:
        assert self._process is not None
        pid, api = self._pid("workers"), self._pid("api")
        self._moment()
        self._freeze(pid)
        self._process.kill()
        self._process.wait()
        self._process = None
        self._until(lambda: not Path(f"/proc/{pid}").exists() and not Path(f"/proc/{api}").exists(), "the children to follow")

    def _freeze(self, pid: int) -> None:
        """Stop a worker and note what it has counted."""
        os.kill(pid, signal.SIGSTOP)
        self._until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", "the worker to stop")
        ids = [id for id, _ in self._rows("SELECT id, 0 FROM usage WHERE settled_at IS NULL")]
        counted: dict[str, int] = {}
        for path in (self._folder / "data" / "journal").glob("[!.]*/slots"):
            left = LeftSlots(os.open(path, os.O_RDWR))
            for id in ids:
                counted[id] = max(counted.get(id, 0), left.counts(id).completion)
            left.close()
        # Nothing is news, too, of a request that was counted before: an engine has begun it again.
        self._snapshots |= {id: tokens for id, tokens in counted.items() if tokens or id in self._snapshots}

    # What is known

    def _rows(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self._folder / "data" / "headrace.db", timeout=20)) as database:
            return database.execute(statement).fetchall()

    def _settled(self) -> None:
        self._until(
            lambda: not self._rows("SELECT id, 0 FROM usage WHERE settled_at IS NULL"), "all bills to be settled", self._settled_within
        )

    def _compare_totals(self) -> None:
        """Since this server's start only API processes were killed, so its one worker has produced all that was opened since."""
        self._settled()
        with closing(sqlite3.connect(self._folder / "data" / "headrace.db", timeout=20)) as database:
            ((billed,),) = database.execute(
                "SELECT coalesce(sum(completion_tokens), 0) FROM usage WHERE opened_at >= ?", (self._started_at,)
            ).fetchall()
        produced = self._engine().completion_tokens
        self.found.totals += abs(produced - billed)
        self.found.compared["totals"] += produced

    def _engine(self) -> EngineStats:
        """Ask the worker itself, as an API process does."""
        (path,) = (self._folder / "run").glob("headrace-*/engine")
        decode = msgspec.msgpack.Decoder(FromWorker).decode
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            question = msgspec.msgpack.encode(StatsRequest())
            connection.sendall(len(question).to_bytes(4, "big") + question)
            stream = connection.makefile("rb")
            while True:
                message = decode(stream.read(int.from_bytes(stream.read(4), "big")))
                if isinstance(message, Stats):
                    return message.stats

    def _compare_requests(self) -> None:
        rows = {id: (prompt, completion, status) for id, prompt, completion, status in self._rows(
            "SELECT id, prompt_tokens, completion_tokens, status FROM usage WHERE settled_at IS NOT NULL"
        )}  # fmt: skip
        found = self.found
        finished = set()
        for asked in self._asked:
            if not asked.id:
                continue
            prompt, completion, _ = rows.get(asked.id, (0, 0, "missing"))
            if asked.told is not None:
                finished.add(asked.id)
                found.told += abs(prompt + completion - asked.told)
                found.compared["told"] += asked.told
            else:
                found.less_than_received += max(0, asked.characters - completion)
                found.compared["broken"] += asked.characters
                if asked.hung_up:
                    found.overshoot = max(found.overshoot, completion - asked.characters)
        for id, counted in self._snapshots.items():
            _, completion, status = rows.get(id, (0, 0, "missing"))
            # Where the worker alone was killed the request went on, and told its client in the end what it cost.
            if id not in finished and status not in ("ok", "cancelled"):
                found.counters += abs(completion - counted)
                found.compared["counters"] += counted

    # The load

    def _load(self) -> Load:
        self._started_at = time.time()
        return Load(self)

    @property
    def users(self) -> int:
        return self._users

    def ask(self, draw: random.Random) -> Asked:
        """One stream, read to its end, or hung up on."""
        asked = Asked()
        self._asked.append(asked)
        leave_at = draw.randrange(1, 60) if draw.random() < 0.2 else None
        prompt = "abcdefgh" * draw.randrange(2, 30)
        try:
            with httpx.stream("POST", f"{self._url}/chat/stream", json={"prompt": prompt, "max_length": 4000}, timeout=60) as answer:
                asked.id = answer.headers.get("x-request-id", "") if answer.status_code == 200 else ""
                event = ""
                for line in answer.iter_lines():
                    if line.startswith("event: "):
                        event = line.removeprefix("event: ")
                    elif line.startswith("data: ") and not event:
                        asked.characters += len(line.removeprefix("data: "))
                        if leave_at is not None and asked.characters >= leave_at:
                            asked.hung_up = True
                            return asked
                    elif line.startswith("data: ") and event == "done":
                        asked.told = json.loads(line.removeprefix("data: "))["tokens_used"]
        except httpx.HTTPError:
            time.sleep(0.02)
        return asked


class Load:
    """Users who ask one thing after another until the block is left."""

    def __init__(self, kills: Kills) -> None:
        self._kills = kills
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> None:
        for number in range(self._kills.users):
            thread = threading.Thread(target=self._use, args=(random.Random(number),), daemon=True)
            self._threads.append(thread)
            thread.start()

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def _use(self, draw: random.Random) -> None:
        while not self._over.is_set():
            self._kills.ask(draw)
