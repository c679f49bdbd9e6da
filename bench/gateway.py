"""The whole gateway on ÷ all of it off: output tok/s with the real model, 16 users.

Two servers of the same model, one with a key that has every limit, the ledger, the cache (which misses), filters and the breaker; the
other one without. No prompt comes twice, so that the cache is asked and filled, and never has the answer.
"""

from __future__ import annotations

from bench.figures import Findings, Side, ratio
from bench.load_side import load
from bench.rounds import interleave
from bench.whole_gateway import gateway_off, gateway_on

BOUND = 0.97


def run(
    *, model: str = "smollm2-135m-instruct", users: int = 16, rounds: int = 7, turns: int = 4, max_tokens: int = 64, kv_cache_gib: int = 1
) -> Findings:
    """`turns`: requests of each user in a round."""
    requests = users * turns
    flags = ["--kv-cache-gib", str(kv_cache_gib)]
    with gateway_on(model, *flags) as (on, key), gateway_off(model, *flags) as off:

        def with_it(number: int) -> float:
            return load(on, number, users=users, requests=requests, max_tokens=max_tokens, key=key, cached=True).tokens_per_second

        def without(number: int) -> float:
            return load(off, number, users=users, requests=requests, max_tokens=max_tokens).tokens_per_second

        values = interleave({"on": with_it, "off": without}, rounds)
    ours, theirs = Side("on", tuple(values["on"]), "tok/s"), Side("off", tuple(values["off"]), "tok/s")
    return Findings("The whole gateway on ÷ off", (ratio(f"gateway on ÷ off, {users} users", ours, theirs, bound=BOUND),))
