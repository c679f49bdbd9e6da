"""The second request with the same 1,000-token prefix: its time to first token, against the first one's.

Many distinct prefixes; for each a first request and then one that ends differently. Both sides come from the same run by
construction: first, second, first, second, ….
"""

from __future__ import annotations

import asyncio

from bench.figures import Findings, Side, ratio
from bench.load_side import complete
from bench.servers import ServerFailed, headrace
from bench.sides.prompts import texts
from headrace.cli.load import LoadFailed, run_load

BOUND = 0.2
_ENDINGS = ("Which word comes first?", "How many words are these?")


def run(
    *, model: str = "smollm2-135m-instruct", prefixes: int = 20, prefix_tokens: int = 1000, max_tokens: int = 8, seed: int = 0
) -> Findings:
    prompts = [f"{prefix} {ending}" for prefix in texts(prefixes + 1, seed, prefix_tokens) for ending in _ENDINGS]
    with headrace(model) as server:
        try:
            result = asyncio.run(
                run_load(server.url, users=1, requests=len(prompts), max_tokens=max_tokens, prompts=prompts, ignore_eos=True)
            )
        except LoadFailed as error:
            server.check()
            raise ServerFailed(f"{server.name}: {error}") from error
        complete(server, result, max_tokens)
    counted = result.samples[2:]  # the first prefix warms up
    sides = [
        Side(name, tuple(1000 * (sample.ttft or 0.0) for sample in counted[offset::2]), "ms")
        for offset, name in enumerate(("first", "second"))
    ]
    length = sum(sample.prompt_tokens for sample in counted) / len(counted)
    return Findings(
        "Prefix cache",
        (ratio(f"TTFT of the second request ÷ the first, {prefixes} prefixes", sides[1], sides[0], bound=BOUND, sense="at most"),),
        (f"Prompts had {length:.0f} tokens on average.",),
    )
