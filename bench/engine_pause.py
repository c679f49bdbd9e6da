"""The pause when an engine is killed or stopped, as running streams and a newcomer see it, with a standby and without.

In each round a few streams run; the worker gets a signal; the pause is from there to the next token of the slowest stream,
or to the first token of a request that is sent right after the signal, whichever is longer.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

from bench.figures import Figure, Findings, Side
from bench.servers import ServerFailed, headrace

PATIENCE = 120.0
STANDBY_BOUND = 1.0
RESTART_BOUND = 6.0
"""Seconds to load a model that is in the cache; beyond `stall_timeout` where the engine has to be found stopped first."""


def run(*, model: str = "smollm2-135m-instruct", rounds: int = 3, users: int = 4, stall_timeout: float = 5.0) -> Findings:
    ways = {
        "killed, with a standby": (True, signal.SIGKILL, STANDBY_BOUND),
        "killed": (False, signal.SIGKILL, RESTART_BOUND),
        "stopped": (False, signal.SIGSTOP, stall_timeout + RESTART_BOUND),
        "stopped, with a standby": (True, signal.SIGSTOP, stall_timeout + STANDBY_BOUND),
    }
    figures = []
    broken = 0
    for name, (standby, number, bound) in ways.items():
        environment = {"HEADRACE_STANDBY": str(standby).lower(), "HEADRACE_STALL_TIMEOUT": str(stall_timeout)}
        with headrace(model, environment=environment) as server:
            pauses = [_round(server.url, number, users, standby=standby) for _ in range(rounds)]
        side = Side(name, tuple(pause for pause, _ in pauses), "s")
        broken += sum(broken for _, broken in pauses)
        print(f"  {side.text}", flush=True)
        figures.append(Figure(f"pause, engine {name}", max(side.values), bound, "at most", "s", (side,)))
    streams = len(ways) * rounds * users
    figures.append(Figure("streams that went on", (streams - broken) / streams, 1.0, "at least", f"of {streams}"))
    return Findings("Pause when an engine is killed or stopped", tuple(figures), ("The value is the longest pause of all rounds.",))


class Stream(threading.Thread):
    """A stream that is read until it has told when the next token came after `mark`."""

    def __init__(self, url: str, prompt: str) -> None:
        super().__init__(daemon=True)
        self._url, self._prompt = url, prompt
        self.tokens = 0
        self.mark: float | None = None
        self.next: float | None = None
        """Seconds from the mark to the token after it; None for a stream that ended without one."""
        self.start()

    def run(self) -> None:
        body = {"prompt": self._prompt, "stream": True, "max_tokens": 4000, "ignore_eos": True}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=body, timeout=PATIENCE) as answer:
                for line in answer.iter_lines():
                    if not line.startswith("data: {") or '"error"' in line:
                        continue
                    self.tokens += 1
                    # What arrives within the first moments may have been on its way already.
                    if self.mark is not None and (since := time.monotonic() - self.mark) > 0.005:
                        self.next = since
                        return
        except httpx.HTTPError:
            return


def _round(url: str, number: int, users: int, *, standby: bool) -> tuple[float, int]:
    """The pause in seconds, and how many streams didn't go on."""
    pid = _until(lambda: _worker(url, standby=standby), "a worker" + " and its standby" * standby)
    streams = [Stream(url, f"Once upon a time, in round {os.urandom(2).hex()}, there were {user} mills.") for user in range(users)]
    _until(lambda: all(stream.tokens >= 8 for stream in streams), "streams to run")
    os.kill(pid, number)
    mark = time.monotonic()
    for stream in streams:
        stream.mark = mark
    newcomer = Stream(url, "And then there was one more.")
    newcomer.mark = mark
    for stream in (*streams, newcomer):
        stream.join(PATIENCE)
    pauses = [stream.next for stream in (*streams, newcomer) if stream.next is not None]
    if newcomer.next is None:
        raise ServerFailed("A request that was sent after the signal had no answer.")
    return max(pauses), sum(stream.next is None for stream in streams)


def _worker(url: str, *, standby: bool) -> int:
    """Pid of the worker that serves; 0 while there is none, or no standby though there should be one."""
    workers: list[dict[str, Any]] = httpx.get(f"{url}/admin/ps", timeout=PATIENCE).json()["workers"]
    states = [worker["state"] for worker in workers]
    return int(workers[0]["pid"]) if states == ["ready", "standby"] or (states == ["ready"] and not standby) else 0


def _until(found: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + PATIENCE
    while not (value := found()):
        if time.monotonic() > end:
            raise ServerFailed(f"Waited {PATIENCE:.0f} s in vain for {what}.")
        time.sleep(0.02)
    return value
