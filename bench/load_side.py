"""One measurement of a server under load; the same lean client for all servers."""

from __future__ import annotations

import asyncio
import os

from bench.servers import Server, ServerFailed
from bench.sides.prompts import WORDS, texts
from headrace.cli.load import LoadFailed, LoadResult, run_load


def load(
    server: Server,
    number: int,
    *,
    users: int,
    requests: int,
    max_tokens: int,
    key: str | None = None,
    cached: bool = False,
    model: str | None = None,
    ignore_eos: bool = True,
) -> LoadResult:
    """A closed loop of `users` with the prompts of round `number`, greedy, streaming, to the last token. Raises `ServerFailed`.

    Unless `cached`, the server's cache is told to stay out of it. `model` names what is asked for
    where the server can't list what it has.
    """
    try:
        result = asyncio.run(
            run_load(
                server.url,
                users=users,
                requests=requests,
                max_tokens=max_tokens,
                prompts=texts(requests, number, WORDS),
                key=key,
                model=model,
                ignore_eos=ignore_eos,
                cached=cached,
            )
        )
    except LoadFailed as error:
        server.check()
        raise ServerFailed(f"{server.name}: {error}") from error
    complete(server, result, max_tokens)
    return result


def complete(server: Server, result: LoadResult, max_tokens: int | None = None) -> None:
    """Raises `ServerFailed` if a request failed or fell short: a figure over what is left would flatter the server."""
    if result.errors:
        server.check()
        raise ServerFailed(f"{server.name}: of {len(result.samples)} requests some failed: {result.errors}")
    if max_tokens is not None and any(sample.tokens != max_tokens for sample in result.samples):
        counts = sorted({sample.tokens for sample in result.samples})
        raise ServerFailed(f"{server.name} was asked for {max_tokens} tokens and gave {counts}.")


def own_cpu_seconds() -> float:
    """CPU time that this process, the load generator, has used."""
    times = os.times()
    return times.user + times.system
