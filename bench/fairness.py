"""A tenant floods the server with 64 requests: another tenant's time to first token, against none flooding.

The quiet tenant sends its requests one after another, with and without the flood, in alternating rounds. The flood is a closed loop:
while the quiet tenant is measured the flooding one always has its 64 requests in the server.
"""

from __future__ import annotations

import asyncio
import contextlib

import httpx

from bench.figures import Figure, Findings, Side, quantile
from bench.load_side import complete
from bench.rounds import interleave
from bench.servers import Server, ServerFailed, headrace
from bench.sides.prompts import texts
from headrace.cli.load import LoadFailed, run_load

BOUND = 3.0
_KEYS = ("bench-quiet-tenant", "bench-flooding-tenant")
_FLOOD_ROUND = 500_000
"""Where the flood's prompts begin to be numbered."""


def run(
    *,
    model: str = "smollm2-135m-instruct",
    flood: int = 64,
    flood_tokens: int = 128,
    requests: int = 8,
    max_tokens: int = 32,
    rounds: int = 5,
) -> Findings:
    """`requests`: of the quiet tenant in a round; p95 is over those of all rounds."""
    found: dict[str, list[float]] = {"alone": [], "beside the flood": []}
    with headrace(model, environment={"HEADRACE_API_KEYS": ",".join(_KEYS)}) as server:

        def measure(name: str, number: int, users: int) -> float:
            waits = asyncio.run(quiet(server, number, requests, max_tokens, users, flood_tokens))
            if number:
                found[name] += waits
            return quantile(waits, 0.5)

        values = interleave(
            {
                "alone": lambda number: measure("alone", 2 * number, 0),
                "beside the flood": lambda number: measure("beside the flood", 2 * number + 1 if number else 0, flood),
            },
            rounds,
        )
    sides = [Side(f"{name}, p50 a round", tuple(waits), "ms") for name, waits in values.items()]
    alone, beside = (quantile(waits, 0.95) for waits in found.values())
    return Findings(
        f"Fairness: {flood} requests of another tenant",
        (Figure("TTFT p95 beside the flood ÷ alone", beside / alone, BOUND, "at most", "×", tuple(sides)),),
        (f"TTFT p95 over {len(found['alone'])} requests each: alone {alone:.1f} ms, beside the flood {beside:.1f} ms.",),
    )


async def quiet(server: Server, number: int, requests: int, max_tokens: int, flood: int, flood_tokens: int) -> list[float]:
    """Times to first token of the quiet tenant, ms, one request after another, while the other keeps `flood` requests in the server."""
    flooding: asyncio.Task[object] | None = None
    if flood:
        flooding = asyncio.create_task(
            run_load(
                server.url,
                users=flood,
                requests=flood * 1_000,
                max_tokens=flood_tokens,
                prompts=texts(flood * 4, _FLOOD_ROUND + number),
                key=_KEYS[1],
                ignore_eos=True,
            )
        )
        await _until_inside(server, flood, flooding)
    try:
        result = await run_load(
            server.url, users=1, requests=requests, max_tokens=max_tokens, prompts=texts(requests, number), key=_KEYS[0], ignore_eos=True
        )
        if flooding is not None and flooding.done():
            raise ServerFailed(f"The flood ended early: {flooding.exception()}")
    except LoadFailed as error:
        server.check()
        raise ServerFailed(f"{server.name}: {error}") from error
    finally:
        if flooding is not None:
            flooding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flooding
            await _until_inside(server, 0, None)
    complete(server, result, max_tokens)
    return [1000 * sample.ttft for sample in result.samples if sample.ttft is not None]


async def _until_inside(server: Server, count: int, flooding: asyncio.Task[object] | None, timeout: float = 60.0) -> None:
    """Wait until that many sequences run or wait in the engine; 0 waits until all are gone."""
    async with httpx.AsyncClient(base_url=server.url, headers={"Authorization": f"Bearer {_KEYS[0]}"}, trust_env=False) as client:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    inside = sequences_inside((await client.get("/metrics")).text)
                    if inside >= count if count else inside == 0:
                        return
                    if flooding is not None and flooding.done():
                        raise ServerFailed(f"The flood ended early: {flooding.exception()}")
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise ServerFailed(f"After {timeout:g} s there were not {count} sequences in the engine.") from None


def sequences_inside(metrics: str) -> float:
    """Sequences running and waiting, from the text of /metrics."""
    names = ("headrace_sequences_running", "headrace_sequences_waiting")
    return sum(float(line.rpartition(" ")[2]) for line in metrics.splitlines() if line.startswith(names))
