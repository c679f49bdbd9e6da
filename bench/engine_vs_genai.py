"""Own engine ÷ OpenVINO GenAI's continuous-batching pipeline: output tok/s, same weights, no HTTP.

Each side runs in a process of its own over the same converted model folder, with the same KV memory, tokens a step and threads;
keys and values are 8-bit on both where the device's default says so. Prompts of about 102 tokens, no two alike; greedy;
end-of-text ignored. Users in a closed loop: each sends its next request when its last one has ended.
"""

from __future__ import annotations

import os

import msgspec

from bench.figures import Figure, Findings, Side, ratio
from bench.rounds import interleave
from bench.turns import Asked, side, speed
from bench.weights import find_model
from headrace.config import EngineSection

BOUND = 1.0


def run(
    *,
    model: str = "smollm2-135m-instruct",
    sequences: tuple[int, ...] = (1, 4, 16, 32),
    rounds: int = 5,
    turns: int = 3,
    max_tokens: int = 64,
    threads: int | None = None,
    kv_cache_gib: int = 1,
) -> Findings:
    """`turns`: requests of each user in a round; `threads`: of each side, one a core unless given."""
    files = msgspec.to_builtins(find_model(model))
    threads = threads or len(os.sched_getaffinity(0))
    settings = {"files": files, "threads": threads, "kv_cache_gib": kv_cache_gib, "step_tokens": EngineSection().step_tokens}
    figures: list[Figure] = []
    idle: dict[str, float] = {"own engine": 0.0, "GenAI": 0.0}
    with side("own engine", "bench.sides.own", **settings) as own, side("GenAI", "bench.sides.genai", **settings) as genai:
        for users in sequences:
            print(f"{users} sequences", flush=True)
            measures = {
                asked.name: Speed(asked, other, idle, users=users, requests=users * turns, max_tokens=max_tokens)
                for asked, other in ((own, genai), (genai, own))
            }
            values = interleave(measures, rounds)
            ours, theirs = (Side(name, tuple(values[name]), "tok/s") for name in measures)
            figures.append(ratio(f"own engine ÷ GenAI, {users} sequences", ours, theirs, bound=BOUND))
    notes = (f"CPU time of the side that waited, over the whole run: {', '.join(f'{name} {used:.2f} s' for name, used in idle.items())}.",)
    return Findings("Own engine ÷ OpenVINO GenAI", tuple(figures), notes)


class Speed:
    """Output tok/s of one side, while the other's idle CPU time is watched."""

    def __init__(self, asked: Asked, other: Asked, idle: dict[str, float], *, users: int, requests: int, max_tokens: int) -> None:
        self._asked, self._other, self._idle = asked, other, idle
        self._question = {"users": users, "requests": requests, "max_tokens": max_tokens}

    def __call__(self, number: int) -> float:
        before = self._other.cpu_seconds()
        # The users' number is part of the round's: prompts of 4 users are never those of 16.
        answer = self._asked.ask(round=number + 1_000 * self._question["users"], **self._question)
        self._idle[self._other.name] += self._other.cpu_seconds() - before
        return speed(self._asked, answer, self._question["requests"] * self._question["max_tokens"])
