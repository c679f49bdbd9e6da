"""A load generator: concurrent users in a closed loop against a streaming chat endpoint.

Speaks OpenAI's chat completions, which llama-server, vLLM and others speak too, or Headrace's own `/chat/stream`.
It shares the machine with the server that it measures, so it has a client of its own (`load_client.py`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import msgspec

from headrace.cli.load_client import Address, Api, Connection, LoadFailed, Sample, ask, count_prompts, first_model, reach
from headrace.cli.open_loop import OpenLoop

__all__ = ["Api", "LoadFailed", "LoadResult", "Sample", "make_prompts", "percentile", "run_load", "run_quickly"]

_T = TypeVar("_T")

_WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place "
    "case week company system program question work night point home water room mother area money story fact month lot right "
    "study book eye job word business issue side kind head house service friend father power hour game line end member law car "
    "city name team minute idea body back parent face level office door health person art war history party result change "
    "morning reason girl moment air teacher force foot boy age food music river stone light road field north garden paper window "
    "market bridge winter summer green small long young early late open clear simple warm cold quick"
)


def run_quickly(load: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run`, on uvloop where it is installed."""
    try:
        from uvloop import new_event_loop
    except ImportError:
        return asyncio.run(load)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(load)


@dataclass(frozen=True, slots=True)
class LoadResult:
    url: str
    model: str | None
    users: int
    total_time: float
    """Seconds from the first request's start to the last one's end."""
    samples: list[Sample] = field(repr=False)

    @property
    def succeeded(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.error is None]

    @property
    def errors(self) -> dict[str, int]:
        """Failed requests by kind."""
        return dict(Counter(sample.error for sample in self.samples if sample.error is not None))

    @property
    def output_tokens(self) -> int:
        return sum(sample.tokens for sample in self.succeeded)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of all successful requests over the total time."""
        return self.output_tokens / self.total_time if self.total_time else 0.0

    def percentiles(self, of: Literal["ttft", "tpot", "seconds"]) -> dict[str, float | None]:
        """p50, p90 and p99 over the successful requests, seconds; None where nothing was measured."""
        values = sorted(v for sample in self.succeeded if (v := getattr(sample, of)) is not None)
        return {f"p{q}": percentile(values, q) for q in (50, 90, 99)}

    def figures(self) -> dict[str, Any]:
        """What `headrace bench --json` prints. Times are seconds."""
        good = self.succeeded
        return {
            "url": self.url,
            "model": self.model,
            "requests": len(self.samples),
            "users": self.users,
            "succeeded": len(good),
            "errors": len(self.samples) - len(good),
            "errors_by_kind": self.errors,
            "total_time": self.total_time,
            "mean_time": sum(sample.seconds for sample in good) / len(good) if good else None,
            "qps": len(good) / self.total_time if self.total_time else 0.0,
            "output_tokens": self.output_tokens,
            "prompt_tokens": sum(sample.prompt_tokens for sample in good),
            "output_tokens_per_second": self.tokens_per_second,
            "ttft": self.percentiles("ttft"),
            "tpot": self.percentiles("tpot"),
        }


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """Linear interpolation between closest ranks, over sorted values; None for none."""
    if not ordered:
        return None
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def make_prompts(count: int, *, tokens: int = 100, seed: int = 0) -> list[str]:
    """Prompts of about `tokens` tokens. No two are alike, nor begin alike: a prefix cache can't help. The same seed gives the same ones."""
    source = random.Random(seed)
    first = source.randrange(1000, 9000)
    vocabulary = _WORDS.split()
    prompts = []
    for number in range(count):
        words = source.choices(vocabulary, k=max(1, tokens - 12))
        prompts.append(f"{first + number} {' '.join(words)}. Write a long story with these words.")
    return prompts


async def run_load(
    url: str,
    *,
    users: int = 16,
    requests: int = 128,
    max_tokens: int = 64,
    prompt_tokens: int = 100,
    prompts: Sequence[str] | None = None,
    model: str | None = None,
    key: str | None = None,
    api: Api = "openai",
    ignore_eos: bool = False,
    seed: int = 0,
    timeout: float = 300.0,
    extra: Mapping[str, object] | None = None,
    cached: bool = False,
    arrivals: Sequence[float] | None = None,
    on_done: Callable[[Sample], None] | None = None,
) -> LoadResult:
    """Send `requests` streaming, greedy requests, `users` at a time, each user the next as soon as its last one ended.

    `prompts` replaces the generated ones (used in a cycle), `extra` is added to every body. `ignore_eos` makes servers that
    know it generate exactly `max_tokens`. Unless `cached`, no answer of a cache is wanted. `timeout` is seconds for one request.
    With `arrivals`, seconds from the start in order, the loop is open (`cli/open_loop.py`).
    Raises `LoadFailed` where the server is away before the first request; what fails later is counted by kind in the result.
    """
    if arrivals is not None:
        requests = len(arrivals)
    address = Address.of(url, api)
    if api == "openai" and model is None:
        model = await first_model(address, key, timeout)
    else:
        await reach(address)
    texts = prompts if prompts is not None else make_prompts(requests, tokens=prompt_tokens, seed=seed)
    fixed: dict[str, object] = {"temperature": 0}
    if api == "openai":
        fixed |= {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
    else:
        fixed |= {"max_length": max_tokens}
    if model is not None:
        fixed["model"] = model
    if ignore_eos:
        fixed["ignore_eos"] = True
    fixed |= extra or {}

    # Bodies are made beforehand, to cost nothing while the clock runs.
    def body(number: int) -> bytes:
        text = texts[number % len(texts)]
        said: dict[str, object] = {"messages": [{"role": "user", "content": text}]} if api == "openai" else {"prompt": text}
        return address.request("POST", msgspec.json.encode(fixed | said), key, cached=cached)

    bodies = [body(number) for number in range(requests)]
    counted: dict[str, int] = {}
    if api == "native":
        counted = await count_prompts(address, list(dict.fromkeys(texts[:requests])), model, key, timeout)
    samples: list[Sample] = []
    turn = iter(range(requests))

    def note(sample: Sample) -> None:
        samples.append(sample)
        if on_done is not None:
            on_done(sample)

    async def user() -> None:
        connection: Connection | None = None
        try:
            for number in turn:
                prompt = counted.get(texts[number % len(texts)])
                sample, connection = await ask(address, connection, number, bodies[number], timeout, prompt)
                note(sample)
        finally:
            if connection is not None:
                connection.close()

    started = time.perf_counter()
    if arrivals is None:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(users, requests)):
                group.create_task(user())
    else:
        prompt_counts = [counted.get(texts[number % len(texts)]) for number in range(requests)]
        await OpenLoop(address, bodies, arrivals, timeout=timeout, prompts=prompt_counts, on_done=note).run()
    total = time.perf_counter() - started
    samples.sort(key=lambda sample: sample.number)
    return LoadResult(url=url, model=model, users=users, total_time=total, samples=samples)
