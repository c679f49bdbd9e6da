"""HTTP server, streaming ÷ own engine without HTTP: output tok/s.

The server with its API process, sockets and SSE against the same engine in process, with the same prompts and settings. The load
generator shares the machine with the server; its CPU time is stated.
"""

from __future__ import annotations

import msgspec

from bench.figures import Findings, Side, ratio
from bench.load_side import load, own_cpu_seconds
from bench.rounds import interleave
from bench.servers import headrace
from bench.turns import side, speed
from bench.weights import find_model

BOUND = 0.95


def run(
    *,
    model: str = "smollm2-135m-instruct",
    users: int = 16,
    rounds: int = 7,
    turns: int = 4,
    max_tokens: int = 64,
    threads: int | None = None,
    kv_cache_gib: int = 1,
) -> Findings:
    """`turns`: requests of each user in a round."""
    files = find_model(model)
    requests = users * turns
    flags = ["--kv-cache-gib", str(kv_cache_gib), *(["--threads", str(threads)] if threads else [])]
    with (
        headrace(model, *flags) as server,
        side("own engine", "bench.sides.own", files=msgspec.to_builtins(files), threads=threads, kv_cache_gib=kv_cache_gib) as own,
    ):

        def through_http(number: int) -> float:
            return load(server, number, users=users, requests=requests, max_tokens=max_tokens).tokens_per_second

        def in_process(number: int) -> float:
            answer = own.ask(round=number, users=users, requests=requests, max_tokens=max_tokens)
            return speed(own, answer, requests * max_tokens)

        before = own_cpu_seconds()
        values = interleave({"server": through_http, "engine": in_process}, rounds)
        client = own_cpu_seconds() - before
    sent = requests * max_tokens * (rounds + 1)
    ours, theirs = Side("server", tuple(values["server"]), "tok/s"), Side("engine", tuple(values["engine"]), "tok/s")
    notes = (f"The load generator used {client / sent * 1e6:.0f} µs of CPU a streamed token.",)
    return Findings("HTTP server ÷ own engine", (ratio(f"server ÷ engine without HTTP, {users} users", ours, theirs, bound=BOUND),), notes)
