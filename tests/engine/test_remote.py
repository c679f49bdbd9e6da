"""The remote engine against a real HTTP server that answers as tests say, broken answers among them."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.upstream import DONE, USAGE, Reply, Upstream, chunk, serving
from headrace.engine.remote import RemoteEngine
from headrace.engine.remote_wire import PSEUDO_TOKEN, EventLines
from headrace.errors import (
    BadRequest,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineUnavailable,
    HeadraceError,
    ModelError,
    ModelNotFound,
    Overloaded,
    RateLimited,
    UpstreamError,
)
from headrace.types import Delta, EngineCard, Event, GenerateRequest, Message, Report, Sampling

pytestmark = pytest.mark.anyio

WHOLE = {
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello you"}, "finish_reason": "length"}],
    "usage": {"prompt_tokens": 7, "completion_tokens": 2},
}


@pytest.fixture(scope="module")
async def one_upstream() -> AsyncIterator[Upstream]:
    async with serving(Upstream()) as running:
        yield running


@pytest.fixture
async def upstream(one_upstream: Upstream) -> Upstream:
    one_upstream.reset()
    return one_upstream


@pytest.fixture
async def engine(upstream: Upstream) -> AsyncIterator[RemoteEngine]:
    made = RemoteEngine(upstream.url, name="far", api_key="sk-upstream")
    await made.start()
    yield made
    await made.close()


def ask(*, text: str | None = None, timeout: float | None = 5, max_tokens: int = 50, **sampling: Any) -> GenerateRequest:
    messages = () if text is not None else (Message(role="system", content="be brief"), Message(role="user", content="hi", name="ann"))
    return GenerateRequest(
        id="req_1", prompt=[], sampling=Sampling(max_tokens=max_tokens, **sampling), timeout=timeout, messages=messages, text=text
    )


async def collect(engine: RemoteEngine, request: GenerateRequest) -> list[Event]:
    return [event async for batch in engine.generate(request) for event in batch]


def said(events: list[Event], choice: int = 0) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta) and event.choice == choice)


async def test_the_card(upstream: Upstream) -> None:
    async def card_of(**more: Any) -> EngineCard:
        engine = RemoteEngine(upstream.url, name="far", **more)
        try:
            return await engine.start()
        finally:
            await engine.close()

    card = await card_of()
    assert (card.model, card.kind, card.context_length) == ("far", "remote", 4096)
    assert "messages" in card.capabilities
    assert "logprobs" not in card.capabilities
    assert (await card_of(model="other")).context_length == 0
    assert (await card_of(context_length=99)).context_length == 99


@pytest.mark.parametrize(("status", "hint"), [(401, "HEADRACE_REMOTE_API_KEY"), (404, "/v1"), (500, "/v1")])
async def test_an_upstream_that_lists_no_models(upstream: Upstream, status: int, hint: str) -> None:
    upstream.models_status = status
    with pytest.raises(ModelError, match=hint):
        await RemoteEngine(upstream.url, name="far").start()


async def test_an_upstream_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="doesn't answer"):
        await RemoteEngine("http://127.0.0.1:9/v1", name="far").start()


async def test_a_stream(upstream: Upstream, engine: RemoteEngine) -> None:
    upstream.replies = [Reply([chunk(""), b": ping\n\n", chunk("hel"), chunk("lo\u2028\n"), chunk(finish="stop"), USAGE, DONE])]
    events = await collect(engine, ask(temperature=0.5, stop=("x",), seed=3, logit_bias={5: 2.0}))
    assert events[:-1] == [
        Delta(0, 0, (PSEUDO_TOKEN,), "hel"),
        Delta(0, 1, (PSEUDO_TOKEN,), "lo\u2028\n"),
        Delta(0, 2, (), "", "stop"),
    ]
    report = events[-1]
    assert isinstance(report, Report)
    assert (report.prompt_tokens, report.cached_tokens, report.completion_tokens) == (7, 3, 5)
    path, body, headers = upstream.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer sk-upstream"
    assert headers["x-request-id"] == "req_1"
    assert body["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": "ann"}]
    assert {name: body[name] for name in ("model", "max_tokens", "temperature", "stop", "seed", "logit_bias", "stream")} == {
        "model": "big-model",
        "max_tokens": 50,
        "temperature": 0.5,
        "stop": ["x"],
        "seed": 3,
        "logit_bias": {"5": 2.0},
        "stream": True,
    }
    assert not {"top_k", "n", "ignore_eos", "min_p"} & set(body)
    assert (engine.stats().running, engine.stats().completion_tokens) == (0, 5)


async def test_no_limit_is_left_out(upstream: Upstream, engine: RemoteEngine) -> None:
    upstream.replies = [Reply([chunk("x", "stop"), DONE])]
    await collect(engine, ask(max_tokens=1_000_000))
    assert "max_tokens" not in upstream.asked[0][1]


async def test_completions_and_choices(upstream: Upstream, engine: RemoteEngine) -> None:
    def piece(index: int, text: str, finish: str | None = None) -> bytes:
        return b"data: " + json.dumps({"choices": [{"index": index, "text": text, "finish_reason": finish}]}).encode() + b"\r\n\r\n"

    upstream.replies = [Reply([piece(1, "b"), piece(0, "a"), piece(0, "a", "length"), piece(1, "", "stop"), DONE])]
    events = await collect(engine, ask(text="once upon", n=2))
    assert upstream.asked[0][0] == "/v1/completions"
    assert upstream.asked[0][1]["prompt"] == "once upon"
    assert upstream.asked[0][1]["n"] == 2
    assert (said(events, 0), said(events, 1)) == ("aa", "b")
    assert isinstance(events[-1], Report)
    # No usage: pieces are counted.
    assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (0, 3)


async def test_the_end_of_the_stream_stands_in_for_done(upstream: Upstream, engine: RemoteEngine) -> None:
    upstream.replies = [Reply([chunk("hello"), chunk(finish="stop").rstrip()])]
    assert said(await collect(engine, ask())) == "hello"


@pytest.mark.parametrize(
    "reply",
    [
        Reply([chunk("hel")]),
        Reply([chunk("hel"), DONE]),
        Reply([chunk("hel")], cut=True),
        Reply([chunk("hel"), b'data: {"error": {"message": "out of memory"}}\n\n']),
        Reply([b"data: {not json\n\n"]),
        Reply([b"data: [1]\n\n"]),
        Reply([b'data: {"choices": [{"index": 5, "delta": {"content": "x"}}]}\n\n']),
        Reply([b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n']),
        Reply([b'data: {"choices": "x"}\n\n']),
        Reply([b'data: {"choices": [7]}\n\n']),
        Reply([b"data: " + b"[" * 100_000 + b"\n\n"]),
        Reply([b"<html>"], kind="text/html"),
        Reply([b"{}"], kind="application/json"),
    ],
)
async def test_broken_answers_are_upstream_errors(upstream: Upstream, engine: RemoteEngine, reply: Reply) -> None:
    upstream.replies = [reply]
    with pytest.raises(UpstreamError):
        await collect(engine, ask())
    assert engine.stats().running == 0


@pytest.mark.parametrize(
    ("status", "headers", "kind", "retry_after"),
    [
        (400, {}, BadRequest, None),
        (422, {}, BadRequest, None),
        (401, {}, UpstreamError, None),
        (403, {}, UpstreamError, None),
        (404, {}, ModelNotFound, None),
        (429, {"retry-after": "7"}, RateLimited, 7.0),
        (503, {"retry-after": "2"}, Overloaded, 2.0),
        (500, {}, UpstreamError, None),
        (302, {"location": "http://127.0.0.1:9/"}, UpstreamError, None),
    ],
)
async def test_refusals(
    upstream: Upstream, engine: RemoteEngine, status: int, headers: dict[str, str], kind: type[HeadraceError], retry_after: float | None
) -> None:
    body = b'{"error": {"message": "because: sk-upstream", "type": "x"}}'
    upstream.replies = [Reply([body], status, "application/json", headers)]
    with pytest.raises(kind) as refused:
        await collect(engine, ask())
    assert type(refused.value) is kind
    assert refused.value.retry_after == retry_after
    assert ("because" in refused.value.message) == (status not in (401, 403))


async def test_an_upstream_that_went_away() -> None:
    async with serving(Upstream()) as upstream:
        engine = RemoteEngine(upstream.url, name="far")
        await engine.start()
    with pytest.raises(EngineUnavailable):
        await collect(engine, ask())
    await engine.close()


async def test_without_streams(upstream: Upstream, engine: RemoteEngine) -> None:
    refused = Reply([b'{"error": {"message": "Streaming is not supported"}}'], 400, "application/json")
    upstream.replies = [refused, Reply([json.dumps(WHOLE).encode()], kind="application/json")]
    for _ in range(2):
        events = await collect(engine, ask())
        assert events[0] == Delta(0, 0, (PSEUDO_TOKEN,), "hello you", "length")
        assert isinstance(events[-1], Report)
        assert events[-1].completion_tokens == 2
    assert [body["stream"] for _, body, _ in upstream.asked] == [True, False, False]


async def test_a_refused_request_takes_no_streams_from_the_others(upstream: Upstream, engine: RemoteEngine) -> None:
    refused = Reply([b'{"error": {"message": "stop: \'stream\' is not allowed"}}'], 400, "application/json")
    wordless = Reply([b"[]"], 400, "application/json")
    for replies in ([refused, refused], [wordless]):
        upstream.replies = [*replies]
        with pytest.raises(BadRequest):
            await collect(engine, ask())
    upstream.replies = [Reply([chunk("x", "stop"), DONE])]
    assert said(await collect(engine, ask())) == "x"
    assert [body["stream"] for _, body, _ in upstream.asked] == [True, False, True, True]


async def test_a_prompt_that_is_too_long_for_the_upstream_is_told_as_ours(upstream: Upstream, engine: RemoteEngine) -> None:
    body = b'{"error": {"message": "at most 8192 tokens", "code": "context_length_exceeded"}}'
    upstream.replies = [Reply([body], 400, "application/json")]
    with pytest.raises(ContextLengthExceeded, match="at most 8192"):
        await collect(engine, ask())


async def test_without_stream_options(upstream: Upstream, engine: RemoteEngine) -> None:
    refused = Reply([b'{"detail": "unknown field stream_options"}'], 422, "application/json")
    upstream.replies = [refused, Reply([chunk("x", "stop"), DONE])]
    assert said(await collect(engine, ask())) == "x"
    assert ["stream_options" in body for _, body, _ in upstream.asked] == [True, False]


async def test_a_deadline_and_a_hang_up_close_the_connection(upstream: Upstream, engine: RemoteEngine) -> None:
    upstream.replies = [Reply([chunk("x")], hang=True)]
    with pytest.raises(DeadlineExceeded):
        await collect(engine, ask(timeout=0.2))
    await asyncio.wait_for(upstream.gone.wait(), 5)
    upstream.gone.clear()
    async with aclosing(engine.generate(ask())) as batches:
        await anext(batches)
    await asyncio.wait_for(upstream.gone.wait(), 5)
    assert engine.stats().running == 0


EVENTS = (
    b'data: {"a": 1}\n\n: comment\r\n\r\nevent: x\r\ndata: two\r\ndata: lines\r\n\r\n'
    b"data:tight\r\rdata: \xe2\x80\xa8\n\nid: 4\n\ndata: last"
)


@given(st.lists(st.integers(0, len(EVENTS)), max_size=30))
def test_events_come_out_the_same_however_they_are_cut(cuts: list[int]) -> None:
    lines = EventLines()
    edges = [0, *sorted(cuts), len(EVENTS)]
    found = [data for begin, end in itertools.pairwise(edges) for data in lines.feed(EVENTS[begin:end])]
    found += lines.finish()
    assert found == [b'{"a": 1}', b"two\nlines", b"tight", "\u2028".encode(), b"last"]
