"""Transformers engine ÷ `transformers serve --continuous-batching`: output tok/s over HTTP, streaming, from the same bf16 safetensors.

The default model's GGUF file is unpacked once. Prompts of about 102 tokens, no two alike; greedy; the same load generator for both.
`transformers serve` can't be asked to ignore the end of text, so it is given the same weights with none named.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.figures import Figure, Findings, Side, ratio
from bench.load_side import load
from bench.rounds import interleave
from bench.servers import Server, headrace, transformers_serve
from bench.unpacked import unpack, without_end
from bench.weights import find_gguf, find_model

BOUND = 1.1


def run(
    *,
    model: str = "smollm2-135m-instruct",
    gguf: str | None = None,
    users: tuple[int, ...] = (1, 16),
    rounds: int = 3,
    turns: int = 2,
    max_tokens: int = 64,
    dtype: str = "bfloat16",
    threads: int = 2,
) -> Findings:
    """`turns`: requests of each user in a round; `dtype`: what ours computes in (theirs takes the weights' own, bfloat16)."""
    found = find_model(model)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = unpack(find_gguf(found, gguf), Path(found.folder), Path(scratch) / model)
        twin = without_end(folder, Path(scratch) / "without-end")
        ours_options = ("--engine", "transformers", "--dtype", dtype, "--threads", str(threads))
        with headrace(str(folder), *ours_options) as ours, transformers_serve(twin) as theirs:
            for count in users:
                print(f"{count} users", flush=True)
                measures = {
                    ours.name: _Speed(ours, None, users=count, requests=count * turns, max_tokens=max_tokens),
                    theirs.name: _Speed(theirs, str(twin), users=count, requests=count * turns, max_tokens=max_tokens),
                }
                values = interleave(measures, rounds)
                sides = [Side(name, tuple(values[name]), "tok/s") for name in measures]
                figures.append(ratio(f"transformers engine ÷ transformers serve, {count} users", *sides, bound=BOUND))
    return Findings("Transformers engine ÷ transformers serve", tuple(figures))


class _Speed:
    """Output tok/s of one server. `model` names it where the server can't list what it has; then it can't ignore an end of text either."""

    def __init__(self, server: Server, model: str | None, *, users: int, requests: int, max_tokens: int) -> None:
        self._server, self._model = server, model
        self._users, self._requests, self._max_tokens = users, requests, max_tokens

    def __call__(self, number: int) -> float:
        found = load(
            self._server,
            number + 1_000 * self._users,
            users=self._users,
            requests=self._requests,
            max_tokens=self._max_tokens,
            model=self._model,
            ignore_eos=self._model is None,
        )
        return found.tokens_per_second
