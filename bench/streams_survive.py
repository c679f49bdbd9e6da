"""Streams whose engine worker is killed, every few seconds, under load: how many come to their end, and how long the pause is.

Each user asks for one completion after another, of a fixed number of tokens with their logprobs, so that each token that arrives can be
counted. A stream is complete if it has exactly the tokens that were asked for, one `[DONE]`, and a usage that says the same.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx

from bench.figures import Figure, Findings, Side
from bench.servers import Server, ServerFailed, headrace
from bench.sides.prompts import WORDS, texts

PATIENCE = 60.0
IN_FLIGHT = 0.02
"""Seconds after a kill in which tokens may still arrive that the dead worker had sent."""
STANDBY_BOUND, BOUND = 1.0, 6.0
"""Seconds that a pause may last."""


def run(
    *,
    model: str = "smollm2-135m-instruct",
    kills: int = 200,
    users: int = 8,
    every: float = 3.0,
    max_tokens: int = 256,
    standby: int = 0,
    kv_cache_gib: int = 1,
) -> Findings:
    """`every`: seconds between kills, more where the next worker isn't ready by then. `standby`: 1 is with a loaded engine in reserve."""
    environment = {"HEADRACE_LOG_LEVEL": "error"} | ({"HEADRACE_STANDBY": "true"} if standby else {})
    with headrace(model, "--kv-cache-gib", str(kv_cache_gib), environment=environment) as server:
        load = Load(server, users, max_tokens)
        with load:
            for number in range(kills):
                load.kill(last=number == kills - 1, every=every)
    return load.findings(kills, standby=bool(standby))


@dataclass
class Stream:
    """One completion, as its client saw it. Times are `time.monotonic()`."""

    begun: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    billed: int = 0
    done: int = 0
    finish: str = ""
    error: str = ""
    ended: float = 0.0

    def complete(self, wanted: int) -> bool:
        return not self.error and self.done == 1 and self.finish == "length" and self.tokens == self.billed == wanted


class Load:
    """Users who ask one thing after another, until the block is left; then they finish what they have."""

    def __init__(self, server: Server, users: int, max_tokens: int) -> None:
        self._server = server
        self._max_tokens = max_tokens
        self._prompts = texts(256, 0, WORDS)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._use, args=(number,), daemon=True) for number in range(users)]
        self._streams: list[Stream] = []
        self._kills: list[float] = []

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()
        self._until(lambda: sum(stream.tokens > 2 for stream in self._streams) >= len(self._threads), "all users to be served")

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def kill(self, *, every: float, last: bool) -> None:
        """Kill the worker, wait until streams go on, and for the rest of the time."""
        pid = self._worker()
        at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        self._kills.append(at)
        self._until(lambda: self._worker() not in (0, pid), "another worker")
        self._until(lambda: any(stream.arrivals and stream.arrivals[-1] > at + IN_FLIGHT for stream in [*self._streams]), "a token")
        if not last:
            time.sleep(max(0.0, at + every - time.monotonic()))

    def findings(self, kills: int, *, standby: bool) -> Findings:
        interrupted = [stream for stream in self._streams if any(stream.begun < at < stream.ended for at in self._kills)]
        complete = sum(stream.complete(self._max_tokens) for stream in interrupted)
        pauses = [
            min(later) - at
            for at in self._kills
            for stream in interrupted
            if stream.begun < at < stream.ended and (later := [one for one in stream.arrivals if one > at + IN_FLIGHT])
        ]
        told = [stream for stream in self._streams if not stream.error]
        lost = sum(max(0, self._max_tokens - stream.tokens) for stream in told)
        twice = sum(max(0, stream.tokens - self._max_tokens) for stream in told)
        errors = sorted({stream.error for stream in self._streams if stream.error})
        bound = STANDBY_BOUND if standby else BOUND
        middle = median(pauses) if pauses else float("inf")
        side = Side("pauses", tuple(pauses), "s")
        share = 100 * complete / max(1, len(interrupted))
        return Findings(
            f"Streams over {kills} kills of their engine{', with a standby' if standby else ''}",
            (
                Figure("streams completed, of those running at a kill", share, 100.0, "at least", "%"),
                Figure("tokens lost or twice", float(lost + twice), 0.0, "at most", "tokens"),
                Figure("pause at a kill, median", middle, bound, "at most", "s", (side,) if pauses else ()),
                Figure("pause at a kill, longest", max(pauses, default=float("inf")), None, "at most", "s"),
            ),
            (f"{len(self._streams)} streams of {self._max_tokens} tokens, {len(interrupted)} of them met a kill; errors: {errors}.",),
        )

    # The server

    def _worker(self) -> int:
        self._server.check()
        try:
            listed = httpx.get(f"{self._server.url}/admin/ps", trust_env=False, timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return 0
        return next((int(line["pid"]) for line in listed.get("workers", ()) if line["state"] == "ready"), 0)

    def _until(self, found: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not found():
            if time.monotonic() > end:
                raise ServerFailed(f"Waited {PATIENCE:g} s for {what}.")
            time.sleep(0.02)

    # The users

    def _use(self, user: int) -> None:
        number = user
        with httpx.Client(base_url=self._server.url, timeout=PATIENCE, trust_env=False) as client:
            while not self._over.is_set():
                self._ask(client, self._prompts[number % len(self._prompts)])
                number += len(self._threads)

    def _ask(self, client: httpx.Client, prompt: str) -> None:
        stream = Stream(time.monotonic())
        self._streams.append(stream)
        asked = {"prompt": prompt, "max_tokens": self._max_tokens, "temperature": 0.7, "ignore_eos": True, "logprobs": 0, "stream": True}
        try:
            with client.stream("POST", "/v1/completions", json=asked | {"stream_options": {"include_usage": True}}) as answer:
                if answer.status_code != 200:
                    stream.error = answer.read().decode()[:200]
                for line in answer.iter_lines():
                    if line == "data: [DONE]":
                        stream.done += 1
                    elif line.startswith("data: "):
                        self._take(stream, json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as error:
            stream.error = type(error).__name__
        stream.ended = time.monotonic()

    def _take(self, stream: Stream, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            stream.error = str(chunk["error"].get("code"))
        for choice in chunk.get("choices", ()):
            tokens = len((choice.get("logprobs") or {}).get("tokens") or ())
            if tokens:
                stream.tokens += tokens
                stream.arrivals.append(time.monotonic())
            stream.finish = choice.get("finish_reason") or stream.finish
        stream.billed = (chunk.get("usage") or {}).get("completion_tokens", stream.billed)
