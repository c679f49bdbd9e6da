"""Start to ready: from `headrace serve` to the first 200 of /health/ready, model already in the cache.

Beside it llama-server over the same GGUF file, to its own /health, interleaved. The first start of both warms the file cache and
is not counted.
"""

from __future__ import annotations

from bench.figures import Figure, Findings, Side, ratio
from bench.rounds import interleave
from bench.servers import find_llama_server, headrace, llama_server
from bench.weights import find_gguf, find_model

BOUND = 5.0


def run(
    *,
    model: str = "smollm2-135m-instruct",
    gguf: str | None = None,
    rounds: int = 5,
    llama_server_file: str | None = None,
    threads: int = 2,
    slots: int = 16,
    context: int = 8192,
) -> Findings:
    file = find_gguf(find_model(model), gguf)
    binary = str(find_llama_server(llama_server_file))

    def ours(_: int) -> float:
        with headrace(model) as server:
            return server.start_seconds

    def theirs(_: int) -> float:
        with llama_server(file, binary=binary, threads=threads, slots=slots, context=context) as server:
            return server.start_seconds

    values = interleave({"headrace": ours, "llama-server": theirs}, rounds)
    sides = [Side(name, tuple(found), "s") for name, found in values.items()]
    return Findings(
        "Start to ready",
        (
            Figure("start to ready, model in the cache", sides[0].median, BOUND, "at most", "s", (sides[0],)),
            ratio("start to ready against llama-server's", *sides),
        ),
    )
