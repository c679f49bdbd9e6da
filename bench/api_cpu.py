"""CPU time of the API process, a streamed token and a request: the echo engine, 64 users.

Two workloads alternate, requests of few tokens and requests of many; each round's pair of CPU times is solved for what a
request costs and what each token adds. Only the API processes' time counts, as the kernel has it, so neither the engine nor the
load generator blurs it.
"""

from __future__ import annotations

import os

from bench.figures import Figure, Findings, Side
from bench.load_side import load
from bench.rounds import interleave
from bench.servers import Server, ServerFailed, cpu_seconds, headrace

TOKEN_BOUND = 25.0
REQUEST_BOUND = 400.0


def run(
    *,
    users: int = 64,
    requests: int = 1024,
    few: int = 1,
    many: int = 257,
    rounds: int = 5,
    pace: float = 0.01,
) -> Findings:
    """`pace`: seconds of an engine step. With 0 the engine runs ahead, and the API process finds many tokens in one frame, which makes
    each cheaper than a model's ever are.
    """
    model = f"echo?pace={pace}"
    many_requests = max(users, requests // 4)
    tick = 1 / os.sysconf("SC_CLK_TCK")

    with headrace(model) as server:
        pids = api_processes(server)

        def cost(max_tokens: int, count: int) -> float:
            """Microseconds a request."""
            before = sum(map(cpu_seconds, pids))
            load(server, max_tokens, users=users, requests=count, max_tokens=max_tokens)
            if sorted(pids) != sorted(api_processes(server)):
                raise ServerFailed("An API process was replaced during the measurement.")
            return (sum(map(cpu_seconds, pids)) - before) / count * 1e6

        values = interleave({"few": lambda _: cost(few, requests), "many": lambda _: cost(many, many_requests)}, rounds)
    solved = [solve(few, low, many, high) for low, high in zip(values["few"], values["many"], strict=True)]
    tokens = Side("per token", tuple(token for _, token in solved), "µs")
    each = Side("per request", tuple(request for request, _ in solved), "µs")
    notes = (
        f"A request of {few} tokens cost {Side('', tuple(values['few']), 'µs').median:.0f} µs, one of {many} tokens "
        f"{Side('', tuple(values['many']), 'µs').median:.0f} µs. The kernel counts CPU time in ticks of {tick * 1e3:.0f} ms, or finer.",
    )
    return Findings(
        f"API process CPU, {users} users, echo with pace {pace:g} s",
        (
            Figure(f"CPU a streamed token, {users} users", tokens.median, TOKEN_BOUND, "at most", "µs", (tokens,)),
            Figure(f"CPU a request, {users} users", each.median, REQUEST_BOUND, "at most", "µs", (each,)),
        ),
        notes,
    )


def solve(few: int, low: float, many: int, high: float) -> tuple[float, float]:
    """(a request, a token) from `low` = request + few × token and `high` = request + many × token."""
    token = (high - low) / (many - few)
    return low - few * token, token


def api_processes(server: Server, key: str | None = None) -> list[int]:
    """The API processes' ids, from the server's own list. Raises `ServerFailed` where it has none."""
    import httpx

    listed = httpx.get(f"{server.url}/admin/ps", trust_env=False, headers={"Authorization": f"Bearer {key}"} if key else {}).json()
    pids = [int(process["pid"]) for process in listed.get("api", ())]
    if not pids:
        raise ServerFailed("/admin/ps lists no API process.")
    return pids
