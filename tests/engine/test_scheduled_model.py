"""The own engine over the real model: what it computes doesn't depend on how it came to be computed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headrace.config import EngineSection
from headrace.engine.openvino_runner import OpenVinoRunner
from headrace.engine.scheduled import ScheduledEngine
from headrace.engine.torch_load import Wanted, load
from headrace.models.as_stored import weights_of
from headrace.models.card import read_object
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Runner
from headrace.types import Delta, Event, GenerateRequest, ModelFiles, PromptScores, Report, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

STORY = "The old mill stood at the bend of the river, and its wheel had not turned for thirty years. " * 12


@pytest.fixture(scope="module", params=["openvino", "transformers"])
async def engine(request: pytest.FixtureRequest, default_model: ModelFiles) -> AsyncIterator[ScheduledEngine]:
    def make_runner() -> Runner:
        if request.param == "transformers":
            folder: Path = request.getfixturevalue("unpacked_model")
            config = read_object(folder / "config.json")
            sizes = {"context_length": 1024, "max_sequences": 8, "step_tokens": 64, "num_blocks": 96}
            return load(Wanted(folder=folder, tensors=weights_of(folder), config=config, dtype="float32", **sizes))
        runner = OpenVinoRunner(
            Path(default_model.folder),
            num_blocks=96,
            kv_bytes=None,
            context_length=1024,
            max_sequences=8,
            threads=None,
            precision="f32",
        )
        runner.load()
        return runner

    engine = ScheduledEngine(
        make_runner,
        lambda: load_tokenizer(default_model),
        name=default_model.name,
        kind=request.param,
        context_length=1024,
        fingerprint=default_model.fingerprint,
        config=EngineSection(step_tokens=64, max_sequences=8),
    )
    await engine.start()
    yield engine
    await engine.close()


async def collect(engine: ScheduledEngine, name: str, prompt: list[int], *, tenant: int = 0, **sampling: object) -> list[Event]:
    wanted = Sampling(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
    request = GenerateRequest(id=name, prompt=prompt, sampling=wanted, tenant=tenant)
    return [event async for batch in engine.generate(request) for event in batch]


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [token for event in events if isinstance(event, Delta) and event.choice == choice for token in event.tokens]


def cached(events: list[Event]) -> int:
    assert isinstance(events[-1], Report)
    return events[-1].cached_tokens


async def test_chunks_cache_batch_and_choices_change_nothing(engine: ScheduledEngine, default_model: ModelFiles) -> None:
    prompt = load_tokenizer(default_model).encode(STORY)
    assert len(prompt) > 3 * 64
    first = await collect(engine, "first", prompt)
    again = await collect(engine, "again", prompt)
    apart = await collect(engine, "apart", prompt, tenant=1)
    full = await collect(engine, "full", prompt[:192], n=3)
    whole = await collect(engine, "whole", prompt[:192])
    batch = await asyncio.gather(
        *(collect(engine, f"batch-{number}", prompt[number:], tenant=2) for number in range(3)), collect(engine, "same", prompt)
    )
    assert (cached(first), cached(apart)) == (0, 0)
    assert cached(again) == cached(batch[-1]) == min(len(prompt) // 32 * 32, len(prompt) - 1)
    assert (cached(full), cached(whole)) == (191, 191)
    assert tokens(first) == tokens(again) == tokens(apart) == tokens(batch[0]) == tokens(batch[-1])
    assert tokens(full, 0) == tokens(full, 1) == tokens(full, 2) == tokens(whole)
    assert engine.stats().blocks_used == 0


async def test_a_completion_scores_itself_as_it_was_drawn(engine: ScheduledEngine, default_model: ModelFiles) -> None:
    prompt = load_tokenizer(default_model).encode(STORY)[:100]
    drawn = await collect(engine, "drawn", prompt, logprobs=0)
    scored = await collect(engine, "scored", prompt + tokens(drawn), prompt_logprobs=0, max_tokens=0)
    assert isinstance(scored[0], PromptScores)
    logprobs = [entry.logprob for event in drawn if isinstance(event, Delta) for entry in event.logprobs]
    assert [entry and entry.logprob for entry in scored[0].scores[100:]] == pytest.approx(logprobs, abs=1e-3)
