"""A request that goes on in another engine says exactly what it would have said in the first."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from driven import Answer, Driven
from fake_runner import LETTERS, VOCABULARY
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.engine.echo import EchoEngine
from headrace.errors import BadRequest
from headrace.models.tokenizer import load_tokenizer
from headrace.types import Delta, Event, GenerateRequest, ModelFiles, PromptScores, Report, Resume, Sampling

TOKENIZER = load_tokenizer(ModelFiles(name="echo", kind="echo"))


def resume(events: Sequence[Event], n: int) -> Resume:
    """What a client that got these events asks the next engine for."""
    deltas = [event for event in events if isinstance(event, Delta)]
    return Resume(
        tuple(tuple(token for delta in deltas if delta.choice == choice for token in delta.tokens) for choice in range(n)),
        tuple(delta.choice for delta in deltas if delta.finish is not None),
        any(isinstance(event, PromptScores) for event in events),
    )


def said(events: Sequence[Event], n: int) -> list[tuple[Any, ...]]:
    """All that a client makes of a request's events, choice by choice."""
    every = []
    for choice in range(n):
        tokens: list[int] = []
        deltas = [event for event in events if isinstance(event, Delta) and event.choice == choice]
        for delta in deltas:
            assert delta.index == len(tokens)
            tokens += delta.tokens
        logprobs = [(one.token, round(one.logprob, 4)) for delta in deltas for one in delta.logprobs]
        every.append((tokens, "".join(delta.text for delta in deltas), deltas[-1].finish, deltas[-1].stop_reason, logprobs))
    return every


def play(request: GenerateRequest, steps: int | None = None, **engine: Any) -> Answer:
    """The request in an engine of its own, up to its end or for so many steps, beside another one."""
    driven = Driven(**{"num_blocks": 256, "context_length": 400, **engine})
    answer = Answer()
    driven.stepper.add(request, answer, 0.0)
    driven.add([7] * 9, name="beside", max_tokens=30)
    while not answer.ended and steps != 0:
        driven.step()
        steps = None if steps is None else steps - 1
    if steps is None:
        driven.drain()
    return answer


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.integers(1, 30),
    min_tokens=st.integers(0, 12),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 1000),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    stop=st.lists(st.text(LETTERS[16:60], min_size=1, max_size=3), max_size=3).map(tuple),
    stop_token_ids=st.lists(st.integers(1, VOCABULARY - 1), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    n=st.integers(1, 3),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
)


@settings(max_examples=60, deadline=None)
@example(sampling=Sampling(max_tokens=1, n=2, seed=0, prompt_logprobs=1), prompt=[1] * 19, deaths=[1], engine={})
@given(
    sampling=SAMPLINGS,
    prompt=st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=40),
    deaths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    engine=st.sampled_from([{}, {"deterministic": True}, {"max_sequences": 2}, {"prefix_cache": False, "step_tokens": 7}]),
)
def test_deaths_change_nothing(sampling: Sampling, prompt: list[int], deaths: list[int], engine: dict[str, Any]) -> None:
    sampling = msgspec.structs.replace(sampling, min_tokens=min(sampling.min_tokens, sampling.max_tokens))
    request = GenerateRequest(id="r", prompt=prompt, sampling=sampling)
    undisturbed = play(request, **engine)
    assert undisturbed.error is None
    events: list[Event] = []
    asked = request
    for steps in deaths:
        part = play(asked, steps, **engine)
        events += [event for event in part.events if not isinstance(event, Report)]
        if part.ended:
            break
        asked = msgspec.structs.replace(request, resume=resume(events, sampling.n))
    else:
        part = play(asked, **engine)
        events += part.events[:-1]
    assert said(events, sampling.n) == said(undisturbed.events, sampling.n)
    assert [event for event in events if isinstance(event, PromptScores)] == [undisturbed.scores] * (sampling.prompt_logprobs is not None)
    report, whole = part.report, undisturbed.report
    assert report is not None
    assert whole is not None
    assert (report.prompt_tokens, report.completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)


@pytest.mark.parametrize("stop", [("ABAB",), ("AB", "BAC"), ()])
def test_at_every_token(stop: tuple[str, ...]) -> None:
    """Text that was held back when the engine died comes out once."""
    bias = {LETTERS.index(letter): 100.0 for letter in "ABC"}
    sampling = Sampling(max_tokens=24, temperature=1.0, seed=11, stop=stop, logit_bias=bias, ignore_eos=True)
    request = GenerateRequest(id="r", prompt=[5, 6, 7], sampling=sampling)
    whole = play(request)
    deltas = [event for event in whole.events if isinstance(event, Delta)]
    for count in range(1, len(deltas)):
        rest = play(msgspec.structs.replace(request, resume=resume(deltas[:count], 1)))
        assert said([*deltas[:count], *rest.events], 1) == said(deltas, 1)


def test_nothing_is_left_to_say() -> None:
    request = GenerateRequest(id="r", prompt=[5], sampling=Sampling(max_tokens=2), resume=Resume(((4, 5),), (0,)))
    answer = play(request)
    assert [type(event) for event in answer.events] == [Report]
    assert answer.report is not None
    assert (answer.report.prompt_tokens, answer.report.completion_tokens) == (1, 2)


def test_in_a_deterministic_engine_a_prompt_goes_in_the_same_pieces_and_a_completion_token_by_token() -> None:
    driven = Driven(num_blocks=200, context_length=700, step_tokens=600, deterministic=True)
    driven.stepper._pace = driven.stepper._scheduler.pace  # the pace knows nothing yet: room for all of it
    request = GenerateRequest(id="r", prompt=[3] * 300, sampling=Sampling(max_tokens=9, temperature=0.0, ignore_eos=True))
    answer = Answer()
    driven.stepper.add(request, answer, 0.0)
    driven.drain()
    assert driven.runner.sizes == [[128], [128], [44], *[[1]] * 8]
    again = Driven(num_blocks=200, context_length=700, step_tokens=600, deterministic=True)
    rest = Answer()
    again.stepper.add(msgspec.structs.replace(request, resume=resume(answer.events[:5], 1)), rest, 0.0)
    again.drain()
    assert again.runner.sizes == [[128], [128], [44], *[[1]] * 8]


class Notes:
    """Keeps what was noted."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []
        self.spans: list[list[tuple[int, int]]] = []

    def step(self, request_ids: Sequence[str], spans: Sequence[tuple[int, int]] = ()) -> None:
        self.steps.append([*request_ids])
        self.spans.append([*spans])

    def alone(self, request_id: str) -> None: ...


def test_only_who_has_got_nothing_yet_is_noted() -> None:
    driven = Driven()
    notes = driven.stepper.notes = Notes()
    driven.add([1, 2, 3], name="a", max_tokens=20)
    for _ in range(4):
        driven.step()
    # The second time its first token may not have been handed over yet.
    assert notes.steps == [["a"], ["a"], []]
    driven.add([4] * 20, name="b", max_tokens=3)
    driven.drain()
    assert notes.steps[3:] == [["b"]] * 3 + [[]]
    # Each step's tokens follow those of the one before, so that it shows how far a request has come.
    spans = [span for (span,) in notes.spans[3:6]]
    assert spans[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] >= 20


@settings(max_examples=40, deadline=None)
@given(
    text=st.text("aé日🦊b", min_size=1, max_size=12),
    stop=st.lists(st.text("aé日🦊b", min_size=1, max_size=3), max_size=2).map(tuple),
    n=st.integers(1, 2),
    more=st.integers(0, 10),
    at=st.integers(1, 40),
)
def test_echo_goes_on_at_any_byte(text: str, stop: tuple[str, ...], n: int, more: int, at: int) -> None:
    """Also in the middle of a character."""
    prompt = TOKENIZER.encode(text)
    sampling = Sampling(max_tokens=len(prompt) + more, min_tokens=more, stop=stop, n=n, ignore_eos=more > 5)
    request = GenerateRequest(id="r", prompt=prompt, sampling=sampling)

    async def whole_and_in_two() -> None:
        engine = EchoEngine(TOKENIZER)
        batches = [batch async for batch in engine.generate(request)]
        events = [event for batch in batches for event in batch]
        first = [event for batch in batches[:at] for event in batch]
        if isinstance(first[-1], Report):
            return
        asked = msgspec.structs.replace(request, id="again", resume=resume(first, n))
        rest = [event async for batch in engine.generate(asked) for event in batch]
        assert said([*first, *rest], n) == said(events, n)
        assert isinstance(rest[-1], Report)
        assert isinstance(events[-1], Report)
        assert rest[-1].completion_tokens == events[-1].completion_tokens

    asyncio.run(whole_and_in_two())


@pytest.mark.anyio
async def test_what_cannot_go_on_is_refused() -> None:
    from test_scheduled import FakeRunner, ask, collect, make_engine

    engine = make_engine(lambda: FakeRunner(num_blocks=128))
    await engine.start()
    for wrong in (Resume(((1,), (2,))), Resume(((1,) * 9,)), Resume(((10**6,),)), Resume(((-1,),))):
        with pytest.raises(BadRequest, match="go on"):
            await collect(engine, msgspec.structs.replace(ask(), resume=wrong))
    await engine.close()
