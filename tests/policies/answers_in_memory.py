"""A response cache without levels, and an engine that speaks when it is told to: what the cache's tests are made of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from headrace.call import Call
from headrace.config import ServerSection
from headrace.journey import Journey
from headrace.models.byte_tokenizer import ByteTokenizer
from headrace.policies.cache import ResponseCache
from headrace.policies.prepare import Prepare
from headrace.policies.turns import Turns
from headrace.records import CacheTags
from headrace.served import ServedModel, ServedModels
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, ModelFiles, Report, Sampling

CAPABILITIES = frozenset({"tokens", "logprobs", "logit_bias", "seed", "n", "min_p", "top_k", "min_tokens", "ignore_eos"})


class KeptAnswers:
    """`ports.Answers` in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[bytes, tuple[bytes, CacheTags]] = {}
        self.below: dict[bytes, bytes] = {}
        self.purges = 0
        self.fetches = 0

    def recall(self, key: bytes) -> bytes | None:
        found = self.kept.get(key)
        return None if found is None else found[0]

    async def fetch(self, key: bytes) -> tuple[bytes, str] | None:
        self.fetches += 1
        await asyncio.sleep(0)
        found = self.below.get(key)
        return None if found is None else (found, "sqlite")

    def keep(self, key: bytes, value: bytes, tags: CacheTags) -> None:
        self.kept[key] = value, tags


class ToldEngine:
    """Each generation says what `say` is told, until `end` or `fail`."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.speaking: list[asyncio.Queue[list[Event] | Exception | None]] = []
        self.closed = 0

    async def start(self) -> EngineCard:
        raise NotImplementedError

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        words: asyncio.Queue[list[Event] | Exception | None] = asyncio.Queue()
        self.requests.append(request)
        self.speaking.append(words)
        try:
            while (word := await words.get()) is not None:
                if isinstance(word, Exception):
                    raise word
                yield word
        finally:
            self.closed += 1

    def say(self, index: int, text: str, *, of: int = -1, finish: str | None = None) -> None:
        self.speaking[of].put_nowait([Delta(0, index, (index,), text, finish)])  # type: ignore[arg-type]

    def end(self, prompt: int, completion: int, *, of: int = -1) -> None:
        self.speaking[of].put_nowait([Report(prompt, 0, completion, 1.0, 2.0, 3.0)])
        self.speaking[of].put_nowait(None)

    def fail(self, error: Exception, *, of: int = -1) -> None:
        self.speaking[of].put_nowait(error)

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...


def told_journey(
    *steps: object, price: float = 0.0, timeout: float = 60.0, answers: KeptAnswers | None = None, turns: Turns | None = None
) -> tuple[Journey, ToldEngine, KeptAnswers, ResponseCache]:
    engine, answers = ToldEngine(), answers or KeptAnswers()
    card = EngineCard(model="m", kind="echo", context_length=4096, vocab_size=259, fingerprint="f", capabilities=CAPABILITIES)
    served = ServedModel(ModelFiles(name="m", kind="echo", context_length=4096), engine, ByteTokenizer(), card=card)
    models = ServedModels([served])
    cache = ResponseCache(answers, models, cached_price=price, turns=turns)
    prepare = Prepare(models, ServerSection(request_timeout=timeout))
    return Journey((prepare, cache, *steps), models), engine, answers, cache  # type: ignore[arg-type]


def greedy(number: int = 0, text: str = "hello", **fields: object) -> Call:
    sampling = fields.pop("sampling", Sampling(max_tokens=64, temperature=0))
    made = Call(id=f"r{number}", route="/chat", model=None, sampling=sampling, text=text, tenant=1)  # type: ignore[arg-type]
    for name, value in fields.items():
        setattr(made, name, value)
    return made


async def until(condition: object) -> None:
    """Let the loop run until it holds."""
    async with asyncio.timeout(10):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)
