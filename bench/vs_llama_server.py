"""Server ÷ llama-server: output tok/s over HTTP, streaming, from the same GGUF file.

llama-server runs with `-t 2 -np 16` by default, a slot for each user. Prompts of about 102 tokens, no two alike; greedy; end-of-text
ignored; the same load generator for both. Time to first token is shown too.
"""

from __future__ import annotations

from bench.figures import Figure, Findings, Side, ratio
from bench.load_side import load
from bench.rounds import interleave
from bench.servers import Server, headrace, llama_server
from bench.weights import find_gguf, find_model
from headrace.cli.load import LoadResult

BOUNDS = {1: 1.0, 4: 2.3, 16: 3.0}


def run(
    *,
    model: str = "smollm2-135m-instruct",
    gguf: str | None = None,
    users: tuple[int, ...] = (1, 4, 16),
    rounds: int = 5,
    turns: int = 3,
    max_tokens: int = 64,
    llama_server_file: str | None = None,
    threads: int = 2,
    slots: int = 16,
    context: int = 8192,
) -> Findings:
    """`turns`: requests of each user in a round; `context`: llama-server's, over all slots."""
    file = find_gguf(find_model(model), gguf)
    figures: list[Figure] = []
    with (
        headrace(model, "--threads", str(threads)) as ours,
        llama_server(file, binary=llama_server_file, threads=threads, slots=slots, context=context) as theirs,
    ):
        idle = {ours.name: 0.0, theirs.name: 0.0}
        for count in users:
            print(f"{count} users", flush=True)
            first: dict[str, list[float]] = {}
            measures = {
                server.name: Speed(server, other, first, idle, users=count, requests=count * turns, max_tokens=max_tokens)
                for server, other in ((ours, theirs), (theirs, ours))
            }
            values = interleave(measures, rounds)
            sides = [Side(name, tuple(values[name]), "tok/s") for name in measures]
            figures.append(ratio(f"server ÷ llama-server, {count} users", *sides, bound=BOUNDS.get(count)))
            waits = [Side(name, tuple(first[name][1:]), "ms") for name in measures]
            figures.append(ratio(f"TTFT p50 against llama-server's, {count} users", *waits))
    notes = (
        f"CPU time of the server that waited, over the whole run: {', '.join(f'{name} {used:.2f} s' for name, used in idle.items())}.",
    )
    return Findings("Server ÷ llama-server", tuple(figures), notes)


class Speed:
    """Output tok/s of one server, while the other's idle CPU time is watched."""

    def __init__(
        self,
        server: Server,
        other: Server,
        first: dict[str, list[float]],
        idle: dict[str, float],
        *,
        users: int,
        requests: int,
        max_tokens: int,
    ) -> None:
        self._server, self._other, self._first, self._idle = server, other, first, idle
        self._users, self._requests, self._max_tokens = users, requests, max_tokens

    def __call__(self, number: int) -> float:
        before = self._other.cpu_seconds()
        result: LoadResult = load(
            self._server, number + 1_000 * self._users, users=self._users, requests=self._requests, max_tokens=self._max_tokens
        )
        self._idle[self._other.name] += self._other.cpu_seconds() - before
        self._first.setdefault(self._server.name, []).append(1000 * (result.percentiles("ttft")["p50"] or 0.0))
        return result.tokens_per_second
