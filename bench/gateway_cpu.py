"""CPU time that the whole gateway adds to the API process, a request and a streamed token: the echo engine, 64 users.

Two servers, one with everything on and one with it off, and on each the two workloads of `api_cpu`: what a request costs and what
each token adds is solved from a round's pair. The difference between the servers is what the gateway adds.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

from bench.api_cpu import api_processes, solve
from bench.figures import Figure, Findings, Side
from bench.load_side import load
from bench.rounds import interleave
from bench.servers import Server, cpu_seconds
from bench.whole_gateway import gateway_off, gateway_on

REQUEST_BOUND = 350.0
TOKEN_BOUND = 8.0


def run(*, users: int = 64, requests: int = 1024, few: int = 1, many: int = 257, rounds: int = 5, pace: float = 0.01) -> Findings:
    """`pace`: seconds of an engine step, as in `api_cpu`."""
    model = f"echo?pace={pace}"
    numbers = count(1)
    """Of prompts: none comes twice, or the cache would have its answer."""

    with gateway_on(model) as (on, key), gateway_off(model) as off:
        processes = {on: api_processes(on, key), off: api_processes(off)}

        def cost(server: Server, tokens: int, asked: int) -> float:
            """Microseconds a request."""
            before = sum(map(cpu_seconds, processes[server]))
            load(server, next(numbers), users=users, requests=asked, max_tokens=tokens, key=key if server is on else None, cached=True)
            return (sum(map(cpu_seconds, processes[server])) - before) / asked * 1e6

        values = interleave(
            {
                "on, few": lambda _: cost(on, few, requests),
                "off, few": lambda _: cost(off, few, requests),
                "on, many": lambda _: cost(on, many, max(users, requests // 4)),
                "off, many": lambda _: cost(off, many, max(users, requests // 4)),
            },
            rounds,
        )
    sides = {which: _solved(values, which, few, many) for which in ("on", "off")}
    figures: list[Figure] = []
    for place, (what, bound) in enumerate((("a request", REQUEST_BOUND), ("a streamed token", TOKEN_BOUND))):
        with_it, without = (Side(which, tuple(pair[place] for pair in pairs), "µs") for which, pairs in sides.items())
        added = with_it.median - without.median
        figures.append(Figure(f"CPU added to {what}, {users} users", added, bound, "at most", "µs", (with_it, without)))
    return Findings(f"API process CPU, the whole gateway on and off, {users} users, echo with pace {pace:g} s", tuple(figures))


def _solved(values: Mapping[str, list[float]], which: str, few: int, many: int) -> list[tuple[float, float]]:
    pairs = zip(values[f"{which}, few"], values[f"{which}, many"], strict=True)
    return [solve(few, low, many, high) for low, high in pairs]
