from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.engine.echo import EchoEngine
from headrace.errors import ContextLengthExceeded, DeadlineExceeded, EngineUnavailable, HeadraceError, ModelError
from headrace.models.template import load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Submits
from headrace.types import Delta, Event, GenerateRequest, Message, ModelFiles, Report, Sampling

pytestmark = pytest.mark.anyio

FILES = ModelFiles(name="echo", kind="echo")
TOKENIZER = load_tokenizer(FILES)


@pytest.fixture
async def engine() -> AsyncIterator[EchoEngine]:
    made = EchoEngine(TOKENIZER)
    await made.start()
    yield made
    await made.close()


def ask(text: str = "hello", *, id: str = "r", timeout: float | None = 10, max_tokens: int = 1000, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(id=id, prompt=TOKENIZER.encode(text), sampling=Sampling(max_tokens=max_tokens, **sampling), timeout=timeout)


async def collect(engine: EchoEngine, request: GenerateRequest) -> list[Event]:
    return [event async for batch in engine.generate(request) for event in batch]


def said(events: list[Event], choice: int = 0) -> tuple[str, str | None, str | int | None, int]:
    deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
    assert all(delta.finish is None for delta in deltas[:-1])
    tokens = 0
    for delta in deltas:
        assert delta.index == tokens
        tokens += len(delta.tokens)
    return "".join(delta.text for delta in deltas), deltas[-1].finish, deltas[-1].stop_reason, tokens


async def test_a_prompt_is_said_once(engine: EchoEngine) -> None:
    events = await collect(engine, ask("héllo\n你好"))
    assert said(events) == ("héllo\n你好", "stop", None, len("héllo\n你好".encode()))
    report = events[-1]
    assert isinstance(report, Report)
    assert report.prompt_tokens == report.completion_tokens == len("héllo\n你好".encode())


async def test_of_a_conversation_the_last_turn_is_said(engine: EchoEngine) -> None:
    template = load_template(FILES)
    assert template is not None
    prompt = template.encode([Message(role="system", content="be brief"), Message(role="user", content="two\nlines <|im_end|>")])
    events = await collect(engine, GenerateRequest(id="r", prompt=prompt, sampling=Sampling(max_tokens=99)))
    assert said(events)[0] == "two\nlines <|im_end|>"


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"max_tokens": 3}, ("hel", "length", None, 3)),
        ({"max_tokens": 5}, ("hello", "stop", None, 5)),
        ({"max_tokens": 7, "ignore_eos": True}, ("hellohe", "length", None, 7)),
        ({"min_tokens": 8}, ("hellohel", "stop", None, 8)),
        ({"stop": ("lo",)}, ("hel", "stop", "lo", 5)),
        ({"stop": ("lx", "l")}, ("he", "stop", "l", 3)),
        ({"stop": ("lox",)}, ("hello", "stop", None, 5)),
        ({"stop": ("h",), "min_tokens": 6}, ("helloh", "stop", None, 6)),
        ({"stop_token_ids": (ord("l"),)}, ("he", "stop", ord("l"), 3)),
        ({"max_tokens": 0}, ("", "length", None, 0)),
    ],
)
async def test_ends(engine: EchoEngine, sampling: dict[str, Any], expected: tuple[str, str, object, int]) -> None:
    if sampling.get("min_tokens") == 6:
        expected = ("hello", "stop", "h", 6)
    assert said(await collect(engine, ask(**sampling))) == expected


async def test_choices(engine: EchoEngine) -> None:
    events = await collect(engine, ask(n=3))
    assert [said(events, choice)[0] for choice in range(3)] == ["hello"] * 3
    assert isinstance(events[-1], Report)
    assert events[-1].completion_tokens == 15


async def test_an_empty_prompt_says_nothing(engine: EchoEngine) -> None:
    assert said(await collect(engine, ask(""))) == ("", "stop", None, 0)


async def test_no_more_than_the_context() -> None:
    engine = EchoEngine(TOKENIZER, context_length=16)
    assert said(await collect(engine, ask("0123456789", ignore_eos=True)))[1:] == ("length", None, 6)
    with pytest.raises(ContextLengthExceeded):
        await collect(engine, ask("0123456789abcdef"))


async def test_many_run_together_and_the_rest_waits_in_order() -> None:
    engine = EchoEngine(TOKENIZER, max_sequences=2)
    order: list[str] = []

    async def one(name: str) -> None:
        await collect(engine, ask("x" * 50, id=name))
        order.append(name)

    tasks = [asyncio.create_task(one(name)) for name in "abcd"]
    while not engine.stats().running:
        await asyncio.sleep(0)
    assert (engine.stats().running, engine.stats().waiting) == (2, 2)
    await asyncio.gather(*tasks)
    assert order == ["a", "b", "c", "d"]
    assert (engine.stats().running, engine.stats().waiting, engine.stats().completion_tokens) == (0, 0, 200)
    assert engine.stats().steps >= 100


async def test_closing_frees_the_sequences(engine: EchoEngine) -> None:
    async with aclosing(engine.generate(ask(ignore_eos=True, n=2))) as batches:
        await anext(batches)
        assert engine.stats().running == 2
    assert engine.stats().running == 0


async def test_a_cancel_delivers_a_report(engine: EchoEngine) -> None:
    assert isinstance(engine, Submits)
    heard: list[Any] = []
    engine.submit(ask(ignore_eos=True), heard.append)
    engine.cancel("r")
    engine.cancel("r")
    engine.cancel("unknown")
    assert [type(batch[-1]) for batch in heard] == [Report]


@pytest.mark.parametrize(("sequences", "phase"), [(1, "decode"), (0, "queue")])
async def test_deadlines_say_where_the_time_went(sequences: int, phase: str) -> None:
    engine = EchoEngine(TOKENIZER, pace=0.005, max_sequences=1)
    background = asyncio.create_task(collect(engine, ask("x" * 100, id="first"))) if not sequences else None
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded, match=phase):
        await collect(engine, ask(timeout=0.03, ignore_eos=True))
    await engine.close()
    if background is not None:
        with pytest.raises(EngineUnavailable):
            await background
    assert engine.stats().running == 0


async def test_pace() -> None:
    engine = EchoEngine(TOKENIZER, pace=0.01)
    begun = asyncio.get_running_loop().time()
    await collect(engine, ask("123456"))
    assert asyncio.get_running_loop().time() - begun >= 0.045


@pytest.mark.parametrize("options", [{"pace": "x"}, {"pace": "-1"}, {"pace": "nan"}, {"speed": "1"}])
async def test_bad_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(ModelError, match=next(iter(options))):
        EchoEngine.from_options(TOKENIZER, options, name="echo", context_length=99, fingerprint="", max_sequences=1)


@given(text=st.text(max_size=20), stop=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_no_stop_string_is_ever_shown(text: str, stop: list[str]) -> None:
    async def run() -> list[Event]:
        return await collect(EchoEngine(TOKENIZER), ask(text, stop=tuple(stop)))

    try:
        events = asyncio.run(run())
    except HeadraceError:
        return
    shown = said(events)[0]
    assert text.startswith(shown)
    assert not any(word in shown for word in stop)
    assert (shown == text) == (not any(word in text for word in stop))
