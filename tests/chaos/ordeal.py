"""One run: a whole server with its stores behind gates, users who keep it busy, a schedule of faults, and the account at the end."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from chaos import invariants
from chaos.books import Row, Standing, rows, standing
from chaos.conductor import Conductor
from chaos.footprint import Footprint, footprints, grown
from chaos.gate import Gate
from chaos.load import Key, Load
from chaos.schedule import Fault
from chaos.witness import Witness
from real_servers import PostgresServer, RealServer, RedisServer
from running_server import RunningServer, eventually

CALM = 20.0
"""Seconds after the last fault in which all must be as it was."""
BUCKET = 20
"""Size of the bucket that is emptied at the end; it fills in a minute."""
SLOTS = 2
BUDGET = 30_000
"""Tokens; spent amid the run."""


class Ordeal:
    """`run` does it all, and then `findings` says what was wrong; `report` is the whole story."""

    def __init__(self, folder: Path, faults: list[Fault], *, seed: int, users: int = 14, limits: str = "redis") -> None:
        self._folder = folder
        self._faults = faults
        self._seed = seed
        self._users = users
        self._in_redis = limits == "redis"
        self.findings: list[str] = []
        self.story: list[str] = [f"seed {seed}, {users} users, limits in {limits}", *(f"  planned  {fault}" for fault in faults)]

    @property
    def report(self) -> str:
        return "\n".join([*self.story, "findings:", *(f"  {finding}" for finding in self.findings or ["none"])])

    def run(self) -> None:
        with ExitStack() as stack:
            self._database, self._redis = PostgresServer(), RedisServer()
            stores: dict[str, tuple[RealServer, Gate]] = {}
            for name, store in (("database", self._database), ("redis", self._redis)):
                stack.enter_context(store)
                stores[name] = store, stack.enter_context(Gate(store.port))
            self._witness = Witness(self._folder)
            environment = self._settings(stores["database"][1].port, stores["redis"][1].port)
            self._server = RunningServer(self._folder, "echo?pace=0.004", environment=environment | self._witness.environment)
            with self._server:
                self._keys = self._make_keys()
                eventually(lambda: len(self._server.ps()["workers"]) == 2, what="a standby")
                before = self._warm()
                conductor = Conductor(self._server, self._witness, stores)
                users = [key for name, key in self._keys.items() if name != "bucket"]
                with Load(self._server.url, self._seed, users, users=self._users) as load:
                    conductor.conduct(self._faults, load.began)
                    # What was begun under the last fault is not all there is.
                    time.sleep(1)
                self.story += [f"  done     {line}" for line in conductor.done]
                self.findings += conductor.troubles + [f"{user} hangs" for user in load.hung]
                self.story += [f"{len(load.asked)} requests:", invariants.ends_of(load.asked)]
                self.findings += invariants.ends_are_right(load.asked, conductor.api_deaths)
                self.findings += invariants.texts_are_whole(load.asked)
                self._calm_again(conductor)
                # A budget that was forgotten is read from the ledger when somebody wants something of it.
                for name in ("ample", "budget"):
                    self._ask(self._keys[name], "once more")
                ledger = self._settled()
                self.findings += invariants.ledger_equals_engine(load.asked, self._witness.account(), ledger)
                self.findings += self._limits_are_right(ledger)
                after = footprints(self._server.ps(), self._witness)
                self.story += [f"  before   {each}" for each in before] + [f"  after    {each}" for each in after]
                self.findings += grown(before, after)
            self.findings += self._all_is_gone()
            self.findings += self._log_is_clean()

    # Before

    def _settings(self, database: int, redis: int) -> dict[str, str]:
        settings: dict[str, Any] = {
            "database_url": self._database.url.replace(f":{self._database.port}/", f":{database}/"),
            "cache_url": f"redis://127.0.0.1:{redis}/1",
            "limits_url": f"redis://127.0.0.1:{redis}/0" if self._in_redis else "memory://",
            "response_cache": "on",
            "max_workers": 2,
            "standby": "true",
            "stall_timeout": 1,
            "slow_client_timeout": 2,
            "keepalive_interval": 0.5,
            "drain_timeout": 5,
        }
        return {f"HEADRACE_{name.upper()}": str(value) for name, value in settings.items()}

    def _make_keys(self) -> dict[str, Key]:
        wanted: dict[str, tuple[bool, dict[str, Any]]] = {
            "free": (False, {"tenant": "acme"}),
            "ample": (False, {"tenant": "bits", "budget_tokens": 100_000_000, "concurrency": 1000}),
            "budget": (True, {"tenant": "acme", "budget_tokens": BUDGET, "budget_period": "total"}),
            "rate": (True, {"tenant": "bits", "rpm": 60}),
            "slots": (True, {"concurrency": SLOTS, "tpm": 1_000_000}),
            "bucket": (True, {"rpm": BUCKET}),
        }
        made = {}
        for name, (limited, wish) in wanted.items():
            record, secret = self._server.new_key(name, scopes=frozenset({"inference", "usage"}), **wish)
            made[name] = Key(name, record.id, secret, limited=limited)
        return made

    def _warm(self) -> list[Footprint]:
        """Everything has been used once when what it holds is looked at."""
        for name in [*self._keys] * 4:
            if name != "bucket":
                self._ask(self._keys[name], f"warm {name}")
        return footprints(self._server.ps(), self._witness)

    def _ask(self, key: Key, text: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key.secret}"}
        body = {"messages": [{"role": "user", "content": text}], "cache": False, **more}
        return httpx.post(f"{self._server.url}/v1/chat/completions", json=body, headers=headers, timeout=30, trust_env=False)

    # After

    def _check(self, found: Callable[[], object], what: str, *, within: float = CALM) -> bool:
        """Wait for it; a finding, where it doesn't come about."""
        begun = time.monotonic()
        try:
            eventually(lambda: _without_failing(found), within=within, what=what)
        except AssertionError as error:
            self.findings.append(str(error))
            return False
        self.story.append(f"  {time.monotonic() - begun:5.1f} s until {what}")
        return True

    def _calm_again(self, conductor: Conductor) -> None:
        url = self._server.url

        def get(path: str) -> httpx.Response:
            return httpx.get(f"{url}{path}", timeout=5, trust_env=False)

        # Connections may have been cut together with a process.
        self._server.client.close()
        self._server.client = httpx.Client(base_url=url, timeout=30, trust_env=False)
        self._check(lambda: all(get("/health/ready").status_code == 200 for _ in range(6)), "readiness, whoever is asked")

        def states() -> list[str]:
            listed = conductor.listing()
            return sorted(line["state"] for kind in ("workers", "api") for line in listed.get(kind, ()))

        self._check(lambda: states() == ["ready", "ready", "ready", "standby"], "two API processes, a worker and a standby")

        def quiet() -> bool:
            told = get("/metrics").text
            zero = ("headrace_sequences_running", "headrace_sequences_waiting", "headrace_kv_blocks_used", "headrace_breaker_state",
                    "headrace_ledger_away", "headrace_quarantine_size")  # fmt: skip
            return all(value == 0 for name in zero for value in _values(told, name)) and _values(told, "headrace_requests_in_flight") == [1]

        self._check(lambda: all(quiet() for _ in range(4)), "nothing running, waiting, open or away, whoever is asked")

    def _settled(self) -> list[Row]:
        self._check(lambda: all(row.settled_at is not None for row in rows(self._database.url)), "settled bills")
        return rows(self._database.url)

    def _limits_are_right(self, ledger: list[Row]) -> Iterator[str]:
        for name, key in self._keys.items():
            billed = sum(row.prompt + row.completion for row in ledger if row.key == key.id)
            self.story.append(f"  {name}: {billed} tokens on {sum(row.key == key.id for row in ledger)} bills")
            # A Redis that forgets doesn't know what those hold who run just then.
            forgets = self._in_redis and any((fault.target, fault.deed) == ("redis", "kill") for fault in self._faults)
            # The engine goes on for an API process that is held up, and can't say where a budget ends.
            held_up = any(fault.target.startswith("api") and fault.deed in ("stop", "slow") for fault in self._faults)
            if name == "budget" and billed > BUDGET * (1.25 if forgets else 1.02 if held_up else 1):
                yield f"the budget of {BUDGET} tokens was passed: {billed} are on the bill"
            if name in ("ample", "budget"):
                yield from self._budget_is_the_ledgers(key, billed)
        yield from self._concurrency_is_free()
        yield from self._bucket_is_full()

    def _budget_is_the_ledgers(self, key: Key, billed: int) -> Iterator[str]:
        if self._in_redis:
            right = Standing(billed, 0, 0)
            try:
                eventually(lambda: standing(self._redis.url, key.id) in (None, right), within=CALM)
            except AssertionError:
                yield f"{key.name}: the ledger says {billed} tokens, Redis {standing(self._redis.url, key.id)}"
            return
        if key.name == "budget":
            return
        asked = spent = 0

        def agree() -> bool:
            nonlocal asked, spent
            answer = self._ask(key, "how much is left?")
            asked += answer.json()["usage"]["total_tokens"]
            spent = 100_000_000 - int(answer.headers["x-ratelimit-remaining-tokens"]) - asked
            return spent == billed

        # What a dead process had leased stays spent until recovery has looked at all that it left, which is after the last of its bills.
        try:
            eventually(agree, within=CALM)
        except AssertionError:
            yield f"{key.name}: the ledger says {billed} tokens, the limits {spent}"

    def _concurrency_is_free(self) -> Iterator[str]:
        key = self._keys["slots"]
        headers = {"Authorization": f"Bearer {key.secret}"}
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True, "ignore_eos": True, "max_tokens": 4000}
        with ExitStack() as stack:
            for number in range(SLOTS + 1):
                client = stack.enter_context(httpx.Client(base_url=self._server.url, headers=headers, timeout=30, trust_env=False))
                status = stack.enter_context(client.stream("POST", "/v1/chat/completions", json=body)).status_code
                if status != (200 if number < SLOTS else 429):
                    yield f"of {SLOTS} requests at a time, number {number + 1} was answered with {status}"

    def _bucket_is_full(self) -> Iterator[str]:
        key = self._keys["bucket"]
        begun, alone = time.monotonic(), len(self._server.events("limits are kept apart"))
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: self._ask(key, "x").status_code, range(2 * BUCKET)))
        refilled = (time.monotonic() - begun) * BUCKET / 60
        admitted = answers.count(200)
        if len(self._server.events("limits are kept apart")) > alone:
            # Redis took longer than a request waits: each process may admit what it knew to be left.
            refilled += BUCKET
        if not BUCKET <= admitted <= BUCKET + refilled or set(answers) - {200, 429}:
            yield f"a full bucket of {BUCKET} admitted {admitted}: {sorted(set(answers))}"

    def _all_is_gone(self) -> Iterator[str]:
        code = self._server.process.returncode
        if code not in (0, -signal.SIGTERM):
            yield f"the server ended with {code}"
        left = self._witness.processes()
        if left:
            yield f"processes are left: {left}"
        journal = self._folder / "data" / "journal"
        # A name with a dot is a folder that a process was just making when it ended: nobody has written to it.
        kept = [path.name for path in journal.glob("[!.]*")]
        if kept:
            yield f"the journal isn't empty: {kept}"
        open_rows = [row for row in rows(self._database.url) if row.settled_at is None]
        if open_rows:
            yield f"{len(open_rows)} bills are open after the server's end"

    def _log_is_clean(self) -> Iterator[str]:
        for line in self._server.log.splitlines():
            if not line.startswith("{"):
                yield f"on stderr: {line[:300]}"
                continue
            told = json.loads(line)
            if "exception" in told or "Traceback" in line:
                yield f"in the log: {line[:1500]}"


def _without_failing(found: Callable[[], object]) -> object:
    try:
        return found()
    except (httpx.HTTPError, OSError):
        return False


def _values(metrics: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE)]
