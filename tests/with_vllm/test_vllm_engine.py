"""The vllm engine over the real model: the contract that every engine keeps."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psutil
import pytest

from headrace.engine.vllm_engine import VllmEngine
from headrace.engine.vllm_load import Wanted
from headrace.errors import BadRequest, ContextLengthExceeded, DeadlineExceeded, EngineDied, HeadraceError, InvalidParameter, ModelError
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Tokenizer
from headrace.types import Delta, Event, GenerateRequest, ModelFiles, PromptScores, Report, Resume, Sampling

pytestmark = pytest.mark.anyio

CONTEXT = 512


def wanted(folder: Path, **other: Any) -> Wanted:
    settings: dict[str, Any] = {
        "folder": folder,
        "context_length": CONTEXT,
        "max_sequences": 16,
        "step_tokens": None,
        "dtype": "float32",
        "device": "auto",
        "trust_remote_code": False,
        "threads": None,
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "gpu_memory_utilization": 0.9,
        "kv_bytes": 2**28,
        "memory_share": 1.0,
        "beside_another": False,
        "prefix_cache": True,
    }
    return Wanted(**settings | other)


@pytest.fixture(scope="module")
def tokenizer(default_model: ModelFiles) -> Tokenizer:
    return load_tokenizer(default_model)


@pytest.fixture(scope="module")
async def engine(unpacked_model: Path, tokenizer: Tokenizer) -> AsyncIterator[VllmEngine]:
    made = VllmEngine(wanted(unpacked_model), tokenizer, name="smollm2", fingerprint="f")
    card = await made.start()
    assert (card.kind, card.context_length, card.vocab_size) == ("vllm", CONTEXT, 49152)
    yield made
    await made.close()


@pytest.fixture(scope="module")
def prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("The old mill stood at the bend of the river, and its wheel had not turned for thirty years. " * 12)


def ask(name: str, prompt: list[int], *, tenant: int = 0, resume: Resume | None = None, timeout: float | None = None, **sampling: Any):
    drawn = Sampling(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling})
    return GenerateRequest(id=name, prompt=prompt, sampling=drawn, tenant=tenant, resume=resume, timeout=timeout)


async def collect(engine: VllmEngine, request: GenerateRequest) -> list[Event]:
    events = [event async for batch in engine.generate(request) for event in batch]
    assert isinstance(events[-1], Report)
    return events


def deltas(events: list[Event], choice: int = 0) -> list[Delta]:
    return [event for event in events if isinstance(event, Delta) and event.choice == choice]


def tokens(events: list[Event], choice: int = 0) -> list[int]:
    return [token for delta in deltas(events, choice) for token in delta.tokens]


def text(events: list[Event], choice: int = 0) -> str:
    return "".join(delta.text for delta in deltas(events, choice))


def report(events: list[Event]) -> Report:
    assert isinstance(events[-1], Report)
    return events[-1]


async def test_a_completion_and_its_report(engine: VllmEngine, tokenizer: Tokenizer, prompt: list[int]) -> None:
    events = await collect(engine, ask("whole", prompt, tenant=10))
    assert [delta.index for delta in deltas(events)] == list(range(12))
    assert tokenizer.decode(tokens(events)) == text(events)
    assert [delta.finish for delta in deltas(events)][-2:] == [None, "length"]
    said = report(events)
    assert (said.prompt_tokens, said.cached_tokens, said.completion_tokens) == (len(prompt), 0, 12)
    assert said.prefill_ms > 0
    assert said.decode_ms > 0
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
    assert stats.blocks_total > 0
    assert stats.completion_tokens >= 12
    assert stats.steps >= 12


async def test_the_prefix_cache_is_a_tenants_own(engine: VllmEngine, prompt: list[int]) -> None:
    first = await collect(engine, ask("first", prompt, tenant=1))
    again = await collect(engine, ask("again", prompt, tenant=1))
    other = await collect(engine, ask("other", prompt, tenant=2))
    assert (report(first).cached_tokens, report(other).cached_tokens) == (0, 0)
    assert report(again).cached_tokens >= 128
    assert tokens(first) == tokens(again) == tokens(other)


async def test_choices_seeds_and_temperature(engine: VllmEngine, prompt: list[int]) -> None:
    greedy = await collect(engine, ask("greedy", prompt, n=2))
    assert tokens(greedy, 0) == tokens(greedy, 1)
    assert report(greedy).completion_tokens == 24
    drawn = [await collect(engine, ask(f"drawn-{number}", prompt, n=2, temperature=1.5, seed=-1)) for number in range(2)]
    assert tokens(drawn[0], 0) == tokens(drawn[1], 0)
    assert tokens(drawn[0], 1) == tokens(drawn[1], 1)
    assert tokens(drawn[0], 0) != tokens(drawn[0], 1)
    narrow = await collect(engine, ask("narrow", prompt, temperature=2.0, top_k=1))
    assert tokens(narrow) == tokens(greedy, 0)


async def test_stop_strings_never_show(engine: VllmEngine, prompt: list[int]) -> None:
    whole = text(await collect(engine, ask("unstopped", prompt, max_tokens=24)))
    stop = whole[7:12]
    cut = await collect(engine, ask("stopped", prompt, max_tokens=24, stop=(stop,)))
    assert text(cut) == whole[: whole.index(stop)]
    assert (deltas(cut)[-1].finish, deltas(cut)[-1].stop_reason) == ("stop", stop)
    assert report(cut).completion_tokens == len(tokens(cut)) < 24


async def test_stop_tokens_bias_and_least_tokens(engine: VllmEngine, prompt: list[int], tokenizer: Tokenizer) -> None:
    plain = tokens(await collect(engine, ask("plain", prompt)))
    stopped = await collect(engine, ask("stopped-by-id", prompt, stop_token_ids=(plain[3],)))
    assert tokens(stopped) == plain[: plain.index(plain[3]) + 1]
    assert deltas(stopped)[-1].stop_reason == plain[3]
    biased = await collect(engine, ask("biased", prompt, logit_bias={plain[0]: -100.0}))
    assert tokens(biased)[0] != plain[0]
    end = next(iter(tokenizer.eos_ids))
    ended = await collect(engine, ask("ended", prompt, logit_bias={end: 100.0}, ignore_eos=False))
    assert (tokens(ended), text(ended), deltas(ended)[-1].finish, deltas(ended)[-1].stop_reason) == ([end], "", "stop", None)
    late = await collect(engine, ask("late", prompt, logit_bias={end: 100.0}, ignore_eos=False, min_tokens=4))
    assert len(tokens(late)) == 5
    penalized = await collect(engine, ask("penalized", [5] * 32, frequency_penalty=2.0, presence_penalty=2.0, max_tokens=24))
    assert len(set(tokens(penalized))) > len(set(tokens(await collect(engine, ask("unpenalized", [5] * 32, max_tokens=24)))))


async def test_logprobs_are_the_models_own(engine: VllmEngine, prompt: list[int]) -> None:
    drawn = await collect(engine, ask("drawn", prompt[:100], logprobs=3, temperature=1.3, seed=4))
    entries = [entry for delta in deltas(drawn) for entry in delta.logprobs]
    assert [entry.token for entry in entries] == tokens(drawn)
    assert all(len(entry.top) == 3 and entry.top[0][1] >= entry.top[1][1] >= entry.top[2][1] for entry in entries)
    assert all(sum(math.exp(each[1]) for each in entry.top) <= 1.001 for entry in entries)
    scored = await collect(engine, ask("scored", prompt[:100] + tokens(drawn), prompt_logprobs=1, max_tokens=0))
    assert isinstance(scored[0], PromptScores)
    assert scored[0].scores[0] is None
    assert len(scored[0].scores) == 112
    again = [entry.logprob for entry in scored[0].scores[100:] if entry is not None]
    assert again == pytest.approx([entry.logprob for entry in entries], abs=1e-2)
    assert (tokens(scored), deltas(scored)[-1].finish, report(scored).completion_tokens) == ([], "length", 0)


async def test_it_goes_on_where_another_engine_ended(engine: VllmEngine, prompt: list[int]) -> None:
    whole = await collect(engine, ask("uncut", prompt, n=2, stop=("never said",)))
    said = tuple(tokens(whole))
    resume = Resume((said[:5], said), (1,))
    rest = await collect(engine, ask("goes-on", prompt, n=2, stop=("never said",), resume=resume))
    assert [delta.index for delta in deltas(rest)] == list(range(5, 12))
    assert tokens(rest) == list(said[5:])
    assert deltas(rest, 1) == []
    assert (report(rest).prompt_tokens, report(rest).completion_tokens) == (len(prompt), 24)


async def test_hanging_up_and_running_late(engine: VllmEngine, prompt: list[int]) -> None:
    async with aclosing(engine.generate(ask("left", prompt, max_tokens=200, n=2))) as events:  # type: ignore[type-var]
        async for _ in events:
            break
    assert engine.stats().running == 0
    heard: list[Event] = []
    done = asyncio.Event()

    def deliver(what: Any) -> None:
        heard.extend([what] if isinstance(what, HeadraceError) else what)
        if isinstance(what, HeadraceError) or isinstance(what[-1], Report):
            done.set()
        elif len(heard) == 1:
            engine.cancel("cancelled")

    engine.submit(ask("cancelled", prompt, max_tokens=200), deliver)
    await asyncio.wait_for(done.wait(), 60)
    assert 0 < report(heard).completion_tokens < 200
    with pytest.raises(DeadlineExceeded, match=r"longer than its 0.05 s"):
        await collect(engine, ask("late", prompt[::-1], max_tokens=400, timeout=0.05))


async def test_what_cant_be_served_is_refused(engine: VllmEngine, prompt: list[int]) -> None:
    for request, kind in (
        (ask("long", [1] * CONTEXT), ContextLengthExceeded),
        (ask("empty", []), InvalidParameter),
        (ask("unknown", [1, 49152]), InvalidParameter),
        (ask("bias", prompt, logit_bias={49152: 1.0}), InvalidParameter),
        (ask("resume", prompt, resume=Resume(((1,), (2,)))), BadRequest),
    ):
        with pytest.raises(kind):
            await collect(engine, request)
    assert len(tokens(await collect(engine, ask("full", [1] * (CONTEXT - 4), max_tokens=100)))) == 4


async def test_many_at_once(engine: VllmEngine, prompt: list[int]) -> None:
    alone = tokens(await collect(engine, ask("alone", prompt[:64])))
    many = await asyncio.gather(*(collect(engine, ask(f"many-{number}", prompt[:64], tenant=number)) for number in range(24)))
    assert [tokens(events) for events in many] == [alone] * 24


async def test_what_vllm_cant_load_is_a_model_error(unpacked_model: Path, tokenizer: Tokenizer) -> None:
    for other, words in (
        ({"device": "cuda"}, "built for cpu"),
        ({"threads": 4096}, "more than the"),
        ({"context_length": 10**9}, "can't serve"),
    ):
        with pytest.raises(ModelError, match=words):
            await VllmEngine(wanted(unpacked_model, **other), tokenizer, name="smollm2", fingerprint="f").start()


async def test_the_death_of_its_engine_is_noticed(engine: VllmEngine, prompt: list[int]) -> None:
    """The last of the engine."""
    cores = [child for child in psutil.Process(os.getpid()).children() if "EngineCore" in " ".join(child.cmdline())]
    assert len(cores) == 1
    events = engine.generate(ask("dies", prompt, max_tokens=400))
    await anext(events)
    cores[0].kill()
    with pytest.raises(EngineDied):
        async for _ in events:
            pass
    assert engine.failed.is_set()
    with pytest.raises(EngineDied):
        await collect(engine, ask("after", prompt))
