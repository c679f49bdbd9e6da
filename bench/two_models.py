"""What a second model in memory costs the one that is used: tokens a second beside it ÷ alone."""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

import httpx

from bench.figures import Figure, Findings, Side
from bench.servers import Server
from bench.several import Users, fleet

TOKENS = 64


def run(*, model: str = "smollm2-135m-instruct", users: int = 8, rounds: int = 5, seconds: float = 6.0) -> Findings:
    """`seconds`: of each round; both servers are there all the time, and are asked in turns."""
    section = f"log_level = 'error'\nmodel = 'one'\n[models.one]\nmodel = '{model}'\nkv_cache_gib = 0.25\n"
    second = f"[models.two]\nmodel = '{model}'\nkv_cache_gib = 0.25\npinned = true\n"
    alone: list[float] = []
    beside: list[float] = []
    with ExitStack() as stack:
        one = stack.enter_context(fleet(section))
        two = stack.enter_context(fleet(section + second))
        # The second model has been used, too.
        _speed(two, "two", users, 1.0)
        _speed(two, "one", users, 1.0)
        _speed(one, "one", users, 1.0)
        for number in range(rounds):
            for server, found in ((one, alone), (two, beside)) if number % 2 else ((two, beside), (one, alone)):
                found.append(_speed(server, "one", users, seconds))
    ratio = median(b / a for a, b in zip(alone, beside, strict=True))
    sides = (Side("beside another", tuple(beside), "tok/s"), Side("alone", tuple(alone), "tok/s"))
    return Findings(title="Two models", figures=(Figure(f"beside another model ÷ alone, c = {users}", ratio, 0.97, sides=sides),))


def _speed(server: Server, model: str, users: int, seconds: float) -> float:
    def ask(client: httpx.Client, number: int) -> int:
        words = {"model": model, "prompt": f"User {number} asks:", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return int(client.post("/v1/completions", json=words).raise_for_status().json()["usage"]["completion_tokens"])

    with Users(server.url, users, ask) as load:
        load.more(users)
        begun, before = time.monotonic(), load.tokens
        time.sleep(seconds)
        tokens, elapsed = load.tokens - before, time.monotonic() - begun
    return tokens / elapsed
