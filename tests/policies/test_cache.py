from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
import pytest
from answers_in_memory import ToldEngine, greedy, told_journey, until
from hypothesis import given
from hypothesis import strategies as st

from headrace.call import Call
from headrace.errors import RequestFailed
from headrace.journey import Journey
from headrace.policies.answer_key import answer_key
from headrace.policies.cache import LARGEST, wanted
from headrace.policies.stored_answer import PIECE, StoredAnswer, joined, pack, unpack
from headrace.types import Delta, Event, GenerateRequest, Message, PromptScores, Report, Sampling, TokenLogprob

pytestmark = pytest.mark.anyio

# Keys

BASE = GenerateRequest(id="r", prompt=[1, 2, 3], sampling=Sampling(max_tokens=8, temperature=0.0), tenant=7)
KNOWN = {"tenant": "ada", "model": "m", "fingerprint": "f", "salt": b"s"}

_sampling = st.builds(
    Sampling,
    max_tokens=st.integers(0, 4),
    min_tokens=st.integers(0, 2),
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([0.5, 1.0]),
    top_k=st.integers(0, 2),
    min_p=st.sampled_from([0.0, 0.1]),
    seed=st.none() | st.integers(-1, 1),
    presence_penalty=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.1]),
    logit_bias=st.dictionaries(st.integers(0, 2), st.sampled_from([-1.0, 1.0])),
    stop=st.lists(st.sampled_from(["a", "b", "ab"]), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 2), max_size=2).map(tuple),
    ignore_eos=st.booleans(),
    n=st.integers(1, 3),
    logprobs=st.none() | st.integers(0, 2),
    prompt_logprobs=st.none() | st.integers(0, 2),
)
_requests = st.builds(
    GenerateRequest,
    id=st.text(max_size=3),
    prompt=st.lists(st.integers(0, 300), max_size=3),
    sampling=_sampling,
    tenant=st.integers(0, 3),
    timeout=st.none() | st.just(5.0),
    messages=st.lists(st.builds(Message, role=st.sampled_from(["user", "system"]), content=st.sampled_from(["", "a"])), max_size=2).map(
        tuple
    ),
    text=st.none() | st.sampled_from(["", "a"]),
)
_known = st.fixed_dictionaries(
    {"tenant": st.sampled_from(["", "a", "b"]), "model": st.sampled_from(["", "a"]), "fingerprint": st.sampled_from(["", "a"])}
    | {"salt": st.sampled_from([b"", b"a"])}
)


@given(one=_requests, other=_requests, known=_known, known_otherwise=_known)
def test_two_requests_have_one_key_exactly_if_all_that_counts_is_equal(
    one: GenerateRequest, other: GenerateRequest, known: dict[str, str], known_otherwise: dict[str, str]
) -> None:
    def counts(request: GenerateRequest) -> GenerateRequest:
        return msgspec.structs.replace(request, id="", timeout=None)

    same = counts(one) == counts(other) and known == known_otherwise
    assert (answer_key(one, **known) == answer_key(other, **known_otherwise)) == same  # type: ignore[arg-type]


@given(data=st.data(), request=_requests, field=st.sampled_from(Sampling.__struct_fields__))
def test_every_field_of_the_sampling_counts(data: st.DataObject, request: GenerateRequest, field: str) -> None:
    other = getattr(data.draw(_sampling), field)
    changed = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **{field: other}))
    same = getattr(request.sampling, field) == other
    assert (answer_key(request, **KNOWN) == answer_key(changed, **KNOWN)) == same  # type: ignore[arg-type]


def test_all_fields_of_a_request_are_thought_of() -> None:
    """Whoever adds one decides whether it counts, and adds it to the strategies above."""
    how = {"id", "timeout", "wanted_within", "priority", "rank", "waited", "resume"}
    assert set(GenerateRequest.__struct_fields__) == how | {"prompt", "sampling", "tenant", "messages", "text"}
    assert len(Sampling.__struct_fields__) == 17


def test_a_key_is_the_same_in_every_process() -> None:
    assert answer_key(BASE, **KNOWN).hex() == answer_key(msgspec.structs.replace(BASE, id="x", timeout=1.0), **KNOWN).hex()  # type: ignore[arg-type]


# What is kept

_LOGPROB = TokenLogprob(5, -0.5, "é", "é".encode(), ((5, -0.5, "é", b"\xc3\xa9"), (6, -1.5, "\ufffd", b"\xff")))


def _events(lengths: list[list[int]], *, scored: bool) -> list[Event]:
    """Choices' deltas, of so many tokens each, interleaved."""
    events: list[Event] = [PromptScores((None, _LOGPROB))] if scored else []
    at = [0] * len(lengths)
    for turn in range(max(map(len, lengths))):
        for choice, counts in enumerate(lengths):
            if turn < len(counts):
                tokens = tuple(range(at[choice], at[choice] + counts[turn]))
                finish = "stop" if turn == len(counts) - 1 else None
                text = "".join(f"<{choice}:{token}>" for token in tokens)
                events.append(Delta(choice, at[choice], tokens, text, finish, None, (_LOGPROB,) * len(tokens) if scored else ()))  # type: ignore[arg-type]
                at[choice] += counts[turn]
    return events


@given(lengths=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=12), min_size=1, max_size=4), scored=st.booleans())
def test_kept_answers_have_all_text_tokens_logprobs_and_ends_at_the_right_places(lengths: list[list[int]], scored: bool) -> None:
    events = _events(lengths, scored=scored)
    answer = unpack(pack(StoredAnswer(3, 9, tuple(joined(events)), {})))
    assert answer is not None
    for choice, counts in enumerate(lengths):
        before = [event for event in events if isinstance(event, Delta) and event.choice == choice]
        after = [event for event in answer.events if isinstance(event, Delta) and event.choice == choice]
        assert "".join(event.text for event in after) == "".join(event.text for event in before)
        assert [token for event in after for token in event.tokens] == [*range(sum(counts))]
        assert [logprob for event in after for logprob in event.logprobs] == [logprob for event in before for logprob in event.logprobs]
        assert [event.finish for event in after] == [None] * (len(after) - 1) + ["stop"]
        assert len(after) <= sum(counts) // PIECE + 1
        at = 0
        for event in after:
            assert event.index == at
            at += len(event.tokens)
    assert [event for event in answer.events if isinstance(event, PromptScores)] == [
        event for event in events if isinstance(event, PromptScores)
    ]
    assert answer.again() == [*answer.events, Report(3, 3, 9, 0.0, 0.0, 0.0)]


@given(st.binary(max_size=60))
def test_what_is_damaged_is_as_if_it_were_not_there(stored: bytes) -> None:
    assert unpack(stored) is None or isinstance(unpack(stored), StoredAnswer)


# Which requests


@pytest.mark.parametrize(
    ("fields", "header", "use"),
    [
        ({}, "", "all"),
        ({"temperature": 0.7}, "", "off"),
        ({"temperature": 0.7, "seed": 3}, "", "all"),
        ({"temperature": 0.7, "cache": True}, "", "all"),
        ({"cache": False}, "", "off"),
        ({}, "no-store", "off"),
        ({}, "No-Cache", "write"),
        ({}, "max-age=0", "write"),
        ({}, "max-age=60, no-transform", "all"),
        ({}, " no-transform , NO-STORE", "off"),
        ({"cache": True}, "no-store", "off"),
        ({"cache": True, "temperature": 1.0}, "no-cache", "write"),
        ({"temperature": 1.0}, "no-cache", "off"),
    ],
)
def test_what_a_call_wants(fields: dict[str, object], header: str, use: str) -> None:
    cache = fields.pop("cache", None)
    sampling = Sampling(max_tokens=4, **{"temperature": 0.0, **fields})  # type: ignore[arg-type]
    assert wanted(greedy(sampling=sampling, cache=cache, cache_control=header)) == use


async def answered(journey: Journey, engine: ToldEngine, call: Call, text: str = "an answer", finish: str = "stop") -> list[Event]:
    """The call's events; the engine says `text` if it is asked."""
    asked = len(engine.speaking)

    async def read() -> list[Event]:
        return [event async for batch in journey.run(call) for event in batch]

    reading = asyncio.create_task(read())
    await until(lambda: reading.done() or len(engine.speaking) > asked)
    if len(engine.speaking) > asked:
        for index, letter in enumerate(text):
            engine.say(index, letter, finish=finish if index == len(text) - 1 else None)
        engine.end(5, len(text))
    return await reading


def said(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.mark.parametrize("first", [True, False])
async def test_a_hit_is_the_same_answer_streamed_or_whole(first: bool) -> None:
    journey, engine, _, _ = told_journey(price=0.25)
    text = "a longer answer, of more than one piece" * 3
    one = await answered(journey, engine, greedy(1, stream=first), text)
    hit = greedy(2, stream=not first)
    two = await answered(journey, engine, hit, "another")
    assert said(one) == said(two) == text
    assert len(engine.requests) == 1
    assert hit.headers["x-headrace-cache"] == "hit"
    outcome = hit.outcome
    assert (outcome.served_from, outcome.cache_level, outcome.finish) == ("cache", "memory", "stop")
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.completion_tokens) == (5, 5, len(text))
    assert (outcome.billed_prompt_tokens, outcome.billed_completion_tokens) == (1, round(len(text) / 4))
    assert outcome.report == Report(5, 5, len(text), 0.0, 0.0, 0.0)


async def test_what_the_second_level_has_is_a_hit() -> None:
    journey, engine, answers, _ = told_journey()
    await answered(journey, engine, greedy(1))
    answers.below = {key: value for key, (value, _) in answers.kept.items()}
    answers.kept.clear()
    hit = greedy(2)
    assert said(await answered(journey, engine, hit)) == "an answer"
    assert (hit.outcome.cache_level, len(engine.requests)) == ("sqlite", 1)
    answers.below = dict.fromkeys(answers.below, b"\xff damaged")
    assert said(await answered(journey, engine, greedy(3), "a new one")) == "a new one"


async def test_no_cache_asks_again_and_keeps_the_new_answer_and_no_store_neither() -> None:
    journey, engine, answers, _ = told_journey()
    await answered(journey, engine, greedy(1), "old")
    fresh = greedy(2, cache_control="no-cache")
    assert said(await answered(journey, engine, fresh, "new")) == "new"
    assert fresh.headers["x-headrace-cache"] == "miss"
    assert said(await answered(journey, engine, greedy(3), "newest")) == "new"
    apart = greedy(4, cache_control="no-store")
    assert said(await answered(journey, engine, apart, "apart")) == "apart"
    assert apart.headers["x-headrace-cache"] == "off"
    assert said(await answered(journey, engine, greedy(5), "newest")) == "new"
    answers.kept.clear()
    await answered(journey, engine, greedy(6, cache_control="no-store"), "apart")
    assert answers.kept == {}


async def test_tenants_are_apart() -> None:
    journey, engine, answers, _ = told_journey()
    await answered(journey, engine, greedy(1, tenant=1), "one")
    assert said(await answered(journey, engine, greedy(2, tenant=2), "two")) == "two"
    assert said(await answered(journey, engine, greedy(3, tenant=1, subject_tenant="ada"), "three")) == "three"
    assert {tags.tenant for _, tags in answers.kept.values()} == {"anonymous", "ada"}


@pytest.mark.parametrize("finish", ["content_filter", "cancelled", "error"])
async def test_answers_without_a_natural_end_are_not_kept(finish: str) -> None:
    journey, engine, answers, _ = told_journey()
    await answered(journey, engine, greedy(1), finish=finish)
    assert answers.kept == {}


async def test_failed_degraded_and_cut_answers_are_not_kept() -> None:
    journey, engine, answers, _ = told_journey()
    await answered(journey, engine, greedy(1, storable=False))
    assert answers.kept == {}

    failing = asyncio.create_task(answered(journey, engine, greedy(2, text="other"), "some"))
    await until(lambda: len(engine.speaking) == 2)
    engine.speaking[-1] = asyncio.Queue()
    failing.cancel()
    await asyncio.wait([failing])
    assert answers.kept == {}

    reading = asyncio.create_task(_first(journey, greedy(3, text="third")))
    await until(lambda: len(engine.speaking) == 3)
    engine.say(0, "a", finish="stop")
    await reading
    assert answers.kept == {}

    broken = asyncio.create_task(_all(journey, greedy(4, text="fourth")))
    await until(lambda: len(engine.speaking) == 4)
    engine.say(0, "a", finish="stop")
    engine.fail(RequestFailed("broken"))
    with pytest.raises(RequestFailed):
        await broken
    assert answers.kept == {}

    cut = greedy(5, text="fifth")
    cut.transforms.append(lambda batch: (setattr(cut, "ended", True), batch)[1])
    await answered(journey, engine, cut, "a")
    assert answers.kept == {}


async def _first(journey: Journey, call: Call) -> None:
    async with aclosing(journey.run(call)) as batches:
        async for _ in batches:
            return


async def _all(journey: Journey, call: Call) -> list[Event]:
    return [event async for batch in journey.run(call) for event in batch]


async def test_an_answer_over_the_limit_is_not_kept() -> None:
    journey, engine, answers, _ = told_journey()
    call = greedy(1)
    reading = asyncio.create_task(_all(journey, call))
    await until(lambda: engine.speaking)
    engine.say(0, "x" * (LARGEST + 1), finish="stop")
    engine.end(5, 1)
    await reading
    assert answers.kept == {}


async def test_what_left_the_filters_is_kept_and_is_not_filtered_again() -> None:
    journey, engine, _, _ = told_journey()

    def shout(batch: list[Event]) -> list[Event]:
        return [Delta(e.choice, e.index, e.tokens, e.text.upper(), e.finish) if isinstance(e, Delta) else e for e in batch]

    filtered = greedy(1, notes={"X-Headrace-Filter": "deny=1"})
    filtered.transforms.append(shout)
    await answered(journey, engine, filtered, "quiet")
    hit = greedy(2)
    assert said(await answered(journey, engine, hit)) == "QUIET"
    assert hit.notes == {"X-Headrace-Filter": "deny=1"}


async def test_what_was_purged_while_it_was_made_is_not_kept_and_not_joined() -> None:
    journey, engine, answers, _ = told_journey()
    reading = asyncio.create_task(_all(journey, greedy(1)))
    await until(lambda: engine.speaking)
    answers.purges += 1
    other = asyncio.create_task(_all(journey, greedy(2)))
    await until(lambda: len(engine.speaking) == 2)
    engine.say(0, "a", of=0, finish="stop")
    engine.end(5, 1, of=0)
    await reading
    assert answers.kept == {}
    engine.say(0, "a", of=1, finish="stop")
    engine.end(5, 1, of=1)
    await other
    assert len(answers.kept) == 1


async def test_models_without_a_known_version_are_not_cached() -> None:
    journey, engine, answers, _ = told_journey()
    served = journey._models.default
    served.card = None
    call = greedy(1)
    await answered(journey, engine, call)
    assert (call.headers["x-headrace-cache"], answers.kept) == ("off", {})
