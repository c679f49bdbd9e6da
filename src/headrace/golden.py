"""What a version of a model answers to its golden prompts, and how much that is like what it should be."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import aclosing
from difflib import SequenceMatcher
from pathlib import Path

from headrace.config import GoldenPrompt
from headrace.engines import EngineClient
from headrace.types import Delta, GenerateRequest, Message, ModelFiles, Sampling

MOST_TOKENS = 32
"""Of each answer."""
TIMEOUT = 120.0
"""Seconds for each answer, on a machine that has much to do."""

_numbers = itertools.count(1)


async def answers(files: ModelFiles, socket: Path, prompts: Sequence[GoldenPrompt]) -> list[str]:
    """Greedy answers of the model whose worker is behind that socket. Raises `HeadraceError` where it doesn't answer."""
    # Of the supervisor's start, which imports this, they would be a fifth.
    from headrace.models.template import load_template
    from headrace.models.tokenizer import load_tokenizer

    own_words = files.kind == "remote"
    tokenizer, template = (None, None) if own_words else await asyncio.to_thread(lambda: (load_tokenizer(files), load_template(files)))
    client = EngineClient(str(socket))
    client.connect()
    try:
        said = []
        for golden in prompts:
            turn = Message(role="user", content=golden.prompt)
            prompt: list[int] = []
            if template is not None:
                prompt = template.encode([turn])
            elif tokenizer is not None:
                prompt = [*tokenizer.bos_ids, *tokenizer.encode(golden.prompt)]
            request = GenerateRequest(
                id=f"golden-{next(_numbers)}",
                prompt=prompt,
                sampling=Sampling(max_tokens=MOST_TOKENS, temperature=0.0),
                timeout=TIMEOUT,
                messages=(turn,) if own_words else (),
                priority="critical",
            )
            text = ""
            async with aclosing(client.generate(request)) as batches:
                async for batch in batches:
                    text += "".join(event.text for event in batch if isinstance(event, Delta))
            said.append(text)
        return said
    finally:
        await client.close()


def likeness(one: str, other: str) -> float:
    """0 to 1: which part of the words of both is the same, in the same order."""
    words, others = one.lower().split(), other.lower().split()
    return 1.0 if words == others else SequenceMatcher(None, words, others, autojunk=False).ratio()


def drift(prompts: Sequence[GoldenPrompt], new: Sequence[str], old: Sequence[str] | None) -> tuple[float, str]:
    """How like the new answers are to what is expected, or else to the old ones, on the mean; and the answer that is least so.

    1 where there is nothing to compare with. An answer that holds what is expected is as expected.
    """
    found: list[tuple[float, str]] = []
    for number, golden in enumerate(prompts):
        wanted = golden.expect if golden.expect is not None else old[number] if old is not None else None
        if wanted is None:
            continue
        held = golden.expect is not None and golden.expect.lower() in new[number].lower()
        like = 1.0 if held else likeness(new[number], wanted)
        found.append((like, f"{golden.prompt!r} is answered with {_short(new[number])}, where it was {_short(wanted)}"))
    if not found:
        return 1.0, ""
    return sum(like for like, _ in found) / len(found), min(found)[1]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "…")
