from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.call import Call
from headrace.config import FilterSection
from headrace.journey import Journey
from headrace.policies.filter_input import filter_steps
from headrace.policies.filter_output import FilterOutput
from headrace.policies.filters.rules import output_rules
from headrace.policies.filters.stream import Rules
from headrace.served import ServedModels
from headrace.types import Delta, Event, Report, Sampling, TokenLogprob

REPORT = Report(prompt_tokens=3, cached_tokens=0, completion_tokens=9, queue_ms=0, prefill_ms=0, decode_ms=0)


def new_call(*, n: int = 1, logprobs: int | None = None) -> Call:
    return Call(id="r", route="/chat", model=None, sampling=Sampling(max_tokens=99, n=n, logprobs=logprobs))


@cache
def _rules(settings: str) -> Rules:
    rules = output_rules(FilterSection.model_validate_json(settings))
    assert rules is not None
    return rules


def step(**settings: object) -> FilterOutput:
    section = FilterSection.model_validate(settings)
    return FilterOutput(
        _rules(section.model_dump_json()),
        report=section.report_filters,
    )


def deltas(texts: list[str], *, choice: int = 0, finish: str | None = "stop") -> list[Event]:
    last = len(texts) - 1
    return [
        Delta(choice=choice, index=place, tokens=(place,), text=text, finish=finish if place == last else None)  # type: ignore[arg-type]
        for place, text in enumerate(texts)
    ]


def text_of(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


def filtered(call: Call, events: list[Event], **settings: object) -> list[Event]:
    transform = step(**settings).transform(call)
    return [out for event in events for out in transform([event])]


def test_tokens_pass_when_they_come_and_held_text_comes_before_the_finish() -> None:
    events = filtered(new_call(), deltas(["my se", "cre", "t sec", "re"], finish="length"), deny_output=["secret"])
    assert [(event.text, event.tokens, event.finish) for event in events if isinstance(event, Delta)] == [
        ("my ", (0,), None),
        ("", (1,), None),
        ("*** ", (2,), None),
        ("secre", (3,), "length"),
    ]


def test_a_repeated_prompt_and_its_scores_show_no_match() -> None:
    call = new_call(logprobs=1)
    words = ["my", " sec", "ret", " is"]
    scores = [TokenLogprob(number, -1.0, word, word.encode(), ((9, -2.0, "secret", b"secret"),)) for number, word in enumerate(words)]
    text, tokens, ended = step(deny_output=["secret"])._repeated(call, "".join(words), scores)
    assert (text, ended) == ("my *** is", False)
    assert [token.text for token in tokens] == ["my", " ***", "", " is"]
    assert tokens[0].top == ((-1, -2.0, "***", b"***"),)
    text, tokens, ended = step(deny_output=["secret"], deny_action="block")._repeated(call, "".join(words), scores)
    assert (text, [token.text for token in tokens][:1], ended) == ("my ", ["my"], True)
    assert "sec" not in "".join(token.text for token in tokens)


def test_a_batch_that_nothing_touches_passes_as_it_is() -> None:
    events = deltas(["hi ", "there"], finish=None)
    out = filtered(new_call(), events, deny_output=["xyz"])
    assert all(one is other for one, other in zip(out, events, strict=True))


def test_each_choice_has_its_own_state() -> None:
    one, two = deltas(["se", "cret!"]), deltas(["cr", "secret", "et"], choice=1)
    mixed = [two[0], one[0], two[1], one[1], two[2]]
    events = filtered(new_call(n=2), mixed, deny_output=["secret"])
    assert (text_of(events, 0), text_of(events, 1)) == ("***!", "cr***et")


def test_blocking_ends_the_choice_where_the_match_begins_and_leaves_the_others() -> None:
    call = new_call(n=2)
    transform = step(deny_output=["secret"], deny_action="block", report_filters=True).transform(call)
    first = transform([*deltas(["a sec", "ret b", "c"], finish=None), *deltas(["fine ", "s"], choice=1, finish=None)])
    assert [(e.choice, e.text, e.finish) for e in first if isinstance(e, Delta)] == [
        (0, "a ", None),
        (0, "", "content_filter"),
        (1, "fine ", None),
        (1, "", None),
    ]
    assert not call.ended
    assert transform(deltas(["more", "!"], finish="stop")) == []
    last = transform([*deltas(["o far"], choice=1), REPORT])
    assert text_of(last, 1) == "so far"
    assert last[-1] is REPORT
    assert call.ended
    assert call.filtered == [("output", "deny", "block")]
    assert call.notes == {"X-Headrace-Filter": "deny=1"}


def test_matches_are_counted_and_told_by_kind() -> None:
    call = new_call()
    transform = step(pii_output="mask", deny_output=["xyz"], report_filters=True).transform(call)
    out = transform(deltas(["a@b.co", " and c@d.org ", "xyz"]))
    assert text_of(out) == "*** and *** ***"
    assert call.filtered == [("output", "email", "mask")] * 2 + [("output", "deny", "mask")]
    assert call.notes == {"X-Headrace-Filter": "email=2,deny=1"}


def test_nothing_is_told_unless_asked() -> None:
    call = new_call()
    step(deny_output=["a"]).transform(call)(deltas(["a"]))
    assert call.notes == {}


def test_all_off_means_no_steps_at_all() -> None:
    assert filter_steps(FilterSection()) == ()


class Source:
    def __init__(self, batches: list[list[Event]]) -> None:
        self.batches, self.given, self.closed = batches, 0, False

    async def events(self) -> AsyncIterator[list[Event]]:
        try:
            for batch in self.batches:
                await asyncio.sleep(0)
                self.given += 1
                yield batch
        finally:
            self.closed = True

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        call.source = self.events()
        yield


@pytest.mark.anyio
async def test_when_all_choices_are_blocked_the_source_is_closed() -> None:
    source = Source([[event] for event in deltas(["the ", "sec", "ret", "goes", "on", "and on"], finish=None)])
    call = new_call()
    journey = Journey([*filter_steps(FilterSection(deny_output=("secret",), deny_action="block")), source], ServedModels([]))
    async with aclosing(journey.run(call)) as batches:
        events = [event async for batch in batches for event in batch]
    assert text_of(events) == "the "
    assert source.closed
    assert source.given == 3
    assert call.outcome.finish == "content_filter"
    assert call.outcome.completion_tokens == 3
    assert call.outcome.error is None


# Log-probabilities


def scored(pieces: list[bytes], *, tops: dict[int, list[str]] | None = None) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            place,
            -0.5 - place,
            raw.decode("utf-8", "replace"),
            raw,
            tuple((90 + at, -1.0 - at, text, text.encode()) for at, text in enumerate((tops or {}).get(place, []))),
        )
        for place, raw in enumerate(pieces)
    ]


def with_logprobs(texts: list[str], pieces: list[bytes], *, tops: dict[int, list[str]] | None = None, **settings: object) -> list[Delta]:
    entries = scored(pieces, tops=tops)
    events: list[Event] = [
        Delta(0, place, (place,), text, "stop" if place == len(texts) - 1 else None, None, (entries[place],))
        for place, text in enumerate(texts)
    ]
    return [event for event in filtered(new_call(logprobs=1), events, **settings) if isinstance(event, Delta)]


def test_logprobs_come_with_their_text_and_show_no_more() -> None:
    pieces = [b"my", b" se", b"cret", b"!", b" now"]
    out = with_logprobs([piece.decode() for piece in pieces], pieces, deny_output=["secret"])
    assert [(d.text, [(e.text, e.token) for e in d.logprobs]) for d in out] == [
        ("my", [("my", 0)]),
        (" ", []),
        ("***", [(" ***", -1), ("", -1)]),
        ("!", [("!", 3)]),
        (" now", [(" now", 4)]),
    ]
    assert [d.tokens for d in out] == [(0,), (1,), (2,), (3,), (4,)]
    assert all(e.raw == e.text.encode() for d in out for e in d.logprobs)


def test_alternatives_that_would_complete_a_match_are_masked() -> None:
    out = with_logprobs(["se", "ven"], [b"se", b"ven"], tops={0: ["se", "secret"], 1: ["ven", "cret", "cr"]}, deny_output=["secret"])
    entries = [entry for delta in out for entry in delta.logprobs]
    assert [[top[2] for top in entry.top] for entry in entries] == [["se", "***"], ["ven", "***", "cr"]]
    assert entries[1].top[1][0] == -1


def test_tokens_whose_bytes_are_not_in_the_text_show_nothing() -> None:
    out = with_logprobs(["a", "b", ""], [b"a", b"b", b"<|im_end|>"], deny_output=["x"])
    assert [entry.text for delta in out for entry in delta.logprobs] == ["a", "b", ""]


def test_a_character_of_several_tokens() -> None:
    whole = "绝密x".encode()
    out = with_logprobs(["", "绝", "", "密x"], [whole[:2], whole[2:4], whole[4:5], whole[5:]], deny_output=["密"])
    assert "".join(delta.text for delta in out) == "绝***x"
    entries = [entry for delta in out for entry in delta.logprobs]
    assert entries[0].raw == whole[:2]
    assert b"".join(entry.raw for entry in entries[1:]).decode("utf-8", "replace").count("密") == 0
    assert len(entries) == 4


def test_text_that_no_token_explains_hides_what_comes_after() -> None:
    out = with_logprobs(["a?", "secret", "b"], [b"a", b"secret", b"b"], deny_output=["secret"])
    assert "".join(delta.text for delta in out) == "a?***b"
    assert [entry.text for delta in out for entry in delta.logprobs] == ["a", "", ""]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["se", "cret", "s", "e", "c", "r", "et", " ", "密", "x@y.", "co", "4111 1111 ", "1111 1111", "é"]), max_size=12
    )
)
def test_logprobs_read_as_the_filtered_text(pieces: list[str]) -> None:
    rules = {"deny_output": ["secret", "cretse"], "pii_output": "mask"}
    out = with_logprobs(pieces, [piece.encode() for piece in pieces], tops={i: ["cret", "zz"] for i in range(12)}, **rules)
    text = "".join(delta.text for delta in out)
    assert text == text_of(filtered(new_call(), deltas(["".join(pieces)]), **rules) if pieces else [])
    entries = [entry for delta in out for entry in delta.logprobs]
    assert len(entries) == len(pieces)
    assert "".join(entry.text for entry in entries) == text
    sent = told = ""
    for delta in out:
        sent += delta.text
        told += "".join(entry.text for entry in delta.logprobs)
        assert sent.startswith(told)


def test_blocking_with_logprobs_shows_only_what_stands_before() -> None:
    out = with_logprobs(["ok ", "se", "cret", "z"], [b"ok ", b"se", b"cret", b"z"], deny_output=["secret"], deny_action="block")
    assert [(d.text, [e.text for e in d.logprobs], d.finish) for d in out] == [
        ("ok ", ["ok "], None),
        ("", [], None),
        ("", [], "content_filter"),
    ]
