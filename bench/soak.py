"""100,000 requests, a fifth of them hung up on: memory, open files, tasks and KV blocks come back to where they were.

The volume goes through the echo engine, with the ledger and the cache (kept small, so that it is full early). Ten times on the way the
API process and the worker are looked at, at rest. The first look, when everything has been used once, is the baseline of files and
tasks; memory's slope is that of the second half, when all that is kept within bounds has come to them. A shorter run with the real
model, hung up on in the same way, is for its KV blocks.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import msgspec
import psutil

from bench.api_cpu import api_processes
from bench.figures import Figure, Findings, Side
from bench.load_side import complete
from bench.servers import Server, ServerFailed, headrace
from bench.sides.prompts import texts
from headrace.cli.load import run_load

ROUNDS = 10
HANG_UPS = 5
"""One in so many."""
SLOPE_BOUND = 0.1
"""KiB a request: a request that left one object behind would leave more."""
_KEPT = {"HEADRACE_RESPONSE_CACHE": "on", "HEADRACE_CACHE_MEMORY_MIB": "1", "HEADRACE_CACHE_DISK_MIB": "4"}


@dataclass(frozen=True, slots=True)
class Look:
    """The server at rest."""

    requests: int
    api_mib: float
    worker_mib: float
    files: int
    tasks: int
    blocks: int


def run(
    *, requests: int = 100_000, users: int = 32, max_tokens: int = 8, model: str = "smollm2-135m-instruct", real: int = 320
) -> Findings:
    """`real`: requests to the real model; 0 leaves it out."""
    with headrace("echo", environment=_KEPT) as server:
        looks = _soak(server, requests, users, max_tokens)
    first, last = looks[0], looks[-1]
    later = looks[len(looks) // 2 :]
    sides = (("API process", [look.api_mib for look in later]), ("worker", [look.worker_mib for look in later]))
    for look in looks:
        print(f"  {look}", flush=True)
    figures = [
        Figure(
            f"memory of the {name}, slope", slope([look.requests for look in later], mib) * 1024, SLOPE_BOUND, "at most", "KiB a request",
            (Side(name, tuple(mib), "MiB"),),
        )
        for name, mib in sides
    ]  # fmt: skip
    figures.append(Figure("open files above the baseline", last.files - first.files, 0, "at most", "files"))
    figures.append(Figure("tasks above the baseline", last.tasks - first.tasks, 0, "at most", "tasks"))
    if real:
        with headrace(model) as server:
            before, *_, after = _soak(server, real, min(users, 16), 32)
        figures.append(Figure(f"KV blocks above the baseline, {real} requests", after.blocks - before.blocks, 0, "at most", "blocks"))
    return Findings(f"{requests:,} requests, one in {HANG_UPS} hung up on, {users} users", tuple(figures))


def slope(at: Sequence[float], values: Sequence[float]) -> float:
    """By the median of all pairs (Theil and Sen): one look at a bad moment doesn't change it."""
    pairs = [(values[j] - values[i]) / (at[j] - at[i]) for i in range(len(at)) for j in range(i + 1, len(at))]
    return sorted(pairs)[len(pairs) // 2]


def _soak(server: Server, requests: int, users: int, max_tokens: int) -> list[Look]:
    (api,) = (psutil.Process(pid) for pid in api_processes(server))
    worker = psutil.Process(httpx.get(f"{server.url}/admin/ps", trust_env=False).json()["workers"][0]["pid"])
    each = requests // ROUNDS
    looks: list[Look] = []
    for number in range(ROUNDS):
        asyncio.run(_round(server, number, each, users, max_tokens))
        looks.append(_look(server, api, worker, (number + 1) * each))
    return looks


async def _round(server: Server, number: int, requests: int, users: int, max_tokens: int) -> None:
    prompts = texts(min(requests, 2000), number)
    hung_up = requests // HANG_UPS
    leavers = max(1, users // HANG_UPS)
    turn = iter(range(hung_up))

    async def leaver() -> None:
        for count in turn:
            await _hang_up(server, prompts[count % len(prompts)], after=count % 3)

    load = run_load(server.url, users=users - leavers, requests=requests - hung_up, max_tokens=max_tokens, prompts=prompts, cached=True)
    result, *_ = await asyncio.gather(load, *(leaver() for _ in range(leavers)))
    complete(server, result)


async def _hang_up(server: Server, prompt: str, *, after: int) -> None:
    """Ask for much, read so many pieces (0: nothing), and be gone."""
    url = urlsplit(server.url)
    body = msgspec.json.encode({"messages": [{"role": "user", "content": prompt}], "max_tokens": 500, "stream": True, "temperature": 1.0})
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    for _ in range(after):
        await reader.read(1024)
    writer.transport.abort()


def _look(server: Server, api: psutil.Process, worker: psutil.Process, requests: int) -> Look:
    """Once nothing runs any more. Raises `ServerFailed` where something never ends."""
    idle = ("headrace_requests_in_flight", "headrace_sequences_running", "headrace_sequences_waiting")
    # One request is this one.
    _await(lambda: sum(_metric(server, name) for name in idle) <= 1, "requests end")
    least = {"tasks": 1 << 30, "files": 1 << 30}

    def settled() -> bool:
        """Connections that were closed are noticed a moment later: no less, for half a second."""
        now = {"tasks": _metric(server, "headrace_tasks"), "files": api.num_fds() + worker.num_fds()}
        lower = any(now[name] < least[name] for name in least)
        least.update({name: min(least[name], now[name]) for name in least})
        quiet.append(not lower)
        return len(quiet) >= 5 and all(quiet[-5:])

    quiet: list[bool] = []
    _await(settled, "connections close", pause=0.1)
    memory = [process.memory_info().rss / 2**20 for process in (api, worker)]
    return Look(requests, memory[0], memory[1], least["files"], least["tasks"], _metric(server, "headrace_kv_blocks_used"))


def _metric(server: Server, name: str) -> int:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    return int(sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)))


def _await(done: Callable[[], bool], what: str, within: float = 60.0, pause: float = 0.05) -> None:
    until = time.monotonic() + within
    while not done():
        if time.monotonic() > until:
            raise ServerFailed(f"It took too long until {what}.")
        time.sleep(pause)
