"""A cached answer, from the request's first byte to the answer's last: 16 users who ask the same thing, streaming.

The users are a closed loop: sixteen requests are always under way in one API process, so each waits for fifteen others. Two workloads
alternate: one where memory has the answer, and one where nothing is kept and the echo engine, which takes no time, answers.
"""

from __future__ import annotations

from bench.figures import Figure, Findings, Side
from bench.load_side import complete
from bench.rounds import interleave
from bench.servers import headrace
from bench.sides.prompts import texts
from headrace.cli.load import run_load, run_quickly

BOUND = 3.0


def run(*, users: int = 16, requests: int = 2000, max_tokens: int = 64, prompts: int = 8, rounds: int = 5) -> Findings:
    """`prompts`: how many different ones are asked for, in turn."""
    asked = texts(prompts, 0)
    with headrace("echo", environment={"HEADRACE_RESPONSE_CACHE": "on"}) as server:

        def p50(*, cached: bool) -> float:
            """Milliseconds."""
            result = run_quickly(
                run_load(server.url, users=users, requests=requests, max_tokens=max_tokens, prompts=asked, ignore_eos=True, cached=cached)
            )
            complete(server, result, max_tokens)
            return 1000 * (result.percentiles("seconds")["p50"] or 0.0)

        values = interleave({"cached": lambda _: p50(cached=True), "echo": lambda _: p50(cached=False)}, rounds)
    cached, echo = Side("cached", tuple(values["cached"]), "ms"), Side("no cache, echo engine", tuple(values["echo"]), "ms")
    figure = Figure(f"cached answer, p50, {users} users", cached.median, BOUND, "at most", "ms", (cached, echo))
    return Findings(f"A cached answer of {max_tokens} tokens, {users} users, one API process", (figure,))
