"""The official client against a running server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving_echo import ScriptedEngine, Stand, live, stand

from headrace.errors import RequestFailed
from headrace.types import Delta, Event, GenerateRequest, PromptScores, Report, TokenLogprob

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def echo() -> Iterator[Stand]:
    with live(stand()) as made:
        yield made


@pytest.fixture
def talk(echo: Stand) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=echo.url + "/v1", api_key="dummy", max_retries=0) as made:
        yield made


def test_chat(talk: openai.OpenAI) -> None:
    answer = talk.chat.completions.create(
        model="house",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "漢字"}]},
        ],
        temperature=0.3,
        seed=5,
        user="me",
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == "house"
    assert answer.system_fingerprint == "fp_echo"
    assert answer.choices[0].message.content == "Hello 漢字"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len("Hello 漢字".encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer._request_id is not None
    assert answer._request_id.startswith("req_")


def test_chat_goes_on_with_its_own_answers(talk: openai.OpenAI) -> None:
    first = talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "One"}])
    history: list[Any] = [{"role": "user", "content": "One"}, first.choices[0].message, {"role": "user", "content": "Two"}]
    assert talk.chat.completions.create(model="house", messages=history).choices[0].message.content == "Two"


def test_chat_streams_role_text_reason_and_usage(talk: openai.OpenAI) -> None:
    text = "a\r\nb 漢字 😀\u2028"
    stream = talk.chat.completions.create(
        model="house", messages=[{"role": "user", "content": text}], stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert mine[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * len(text.encode())
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_without_usage_has_none(talk: openai.OpenAI) -> None:
    chunks = list(talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "ab"}], stream=True))
    assert all(len(chunk.choices) == 1 for chunk in chunks)
    assert "usage" not in chunks[0].model_dump(exclude_unset=True)


def test_limits(talk: openai.OpenAI) -> None:
    cut = talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "abcdef"}], max_completion_tokens=3)
    assert cut.choices[0].message.content == "abc"
    assert cut.choices[0].finish_reason == "length"
    stopped = talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "one two"}], stop=[" two", "x"])
    assert stopped.choices[0].message.content == "one"
    ours = talk.chat.completions.create(
        model="house",
        messages=[{"role": "user", "content": "ab"}],
        max_tokens=5,
        extra_body={"ignore_eos": True, "top_k": 5, "min_tokens": 5},
    )
    assert ours.choices[0].message.content == "ababa"


def test_completions_of_every_kind_of_prompt(talk: openai.OpenAI) -> None:
    prompts: list[tuple[Any, list[str]]] = [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([97, 98], ["ab"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ]
    for prompt, texts in prompts:
        for stream in (False, True):
            for echo in (False, True):
                got: dict[int, str] = {}
                answer: Any = talk.completions.create(model="house", prompt=prompt, n=2, echo=echo, stream=stream)
                for part in answer if stream else [answer]:
                    assert part.object == "text_completion"
                    assert part.id.startswith("cmpl-")
                    for choice in part.choices:
                        got[choice.index] = got.get(choice.index, "") + choice.text
                assert [got[index] for index in sorted(got)] == [text * (1 + echo) for text in texts for _ in range(2)]


def test_models(talk: openai.OpenAI) -> None:
    assert [model.id for model in talk.models.list()] == ["echo-1", "house"]
    assert talk.models.retrieve("house").owned_by == "headrace"
    with pytest.raises(openai.NotFoundError) as refused:
        talk.models.retrieve("Org/No")
    assert refused.value.code == "model_not_found"


def test_errors_are_the_clients_own(talk: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "x"}], temperature=9, stream=True)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        talk.chat.completions.create(model="no", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as long:
        talk.completions.create(model="house", prompt="x" * 5000, stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unsupported:
        talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "x"}], logprobs=True)
    assert unsupported.value.code == "unsupported"


def scored(token: int, logprob: float, raw: bytes) -> TokenLogprob:
    return TokenLogprob(token, logprob, raw.decode("utf-8", "replace"), raw, ((65, -0.5, "A", b"A"), (66, float("-inf"), "B", b"B")))


async def scores(request: GenerateRequest) -> Any:
    events: list[Event] = []
    if request.sampling.prompt_logprobs is not None:
        prompt = tuple(None if at == 0 else scored(token, -1.0, bytes([token])) for at, token in enumerate(request.prompt))
        events.append(PromptScores(prompt))
    completion = 0
    if request.sampling.max_tokens:
        wanted = request.sampling.logprobs is not None
        one = (scored(0xC3, -0.25, b"\xc3"),) if wanted else ()
        two = (scored(0xBC, -0.75, b"\xbc"),) if wanted else ()
        events += [Delta(0, 0, (0xC3,), "", None, None, one), Delta(0, 1, (0xBC,), "ü", "length", None, two)]
        completion = 2
    else:
        events.append(Delta(0, 0, (), "", "length"))
    yield events
    yield [Report(len(request.prompt), 1, completion, 1.0, 2.0, 3.0)]


def test_logprobs() -> None:
    with live(stand(ScriptedEngine(scores))) as made, openai.OpenAI(base_url=made.url + "/v1", api_key="x") as talk:
        messages: Any = [{"role": "user", "content": "x"}]
        whole = talk.chat.completions.create(model="house", messages=messages, logprobs=True, top_logprobs=2)
        assert made.engine.requests[-1].sampling.logprobs == 2
        logprobs = whole.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert [(entry.logprob, entry.bytes) for entry in logprobs.content] == [(-0.25, [0xC3]), (-0.75, [0xBC])]
        assert [top.logprob for top in logprobs.content[0].top_logprobs] == [-0.5, -9999.0]
        assert whole.choices[0].message.content == "ü"
        assert whole.usage is not None
        assert whole.usage.prompt_tokens_details is not None
        assert whole.usage.prompt_tokens_details.cached_tokens == 1

        pieces = list(talk.chat.completions.create(model="house", messages=messages, logprobs=True, stream=True))
        entries = [entry for chunk in pieces for choice in chunk.choices if choice.logprobs for entry in choice.logprobs.content or []]
        assert [entry.logprob for entry in entries] == [-0.25, -0.75]

        for stream in (False, True):
            got: Any = talk.completions.create(model="house", prompt="aü", echo=True, logprobs=2, max_tokens=2, stream=stream)
            parts = [choice for part in (got if stream else [got]) for choice in part.choices]
            text = "".join(part.text for part in parts)
            legacy = [part.logprobs for part in parts if part.logprobs is not None]
            tokens = [token for each in legacy for token in each.tokens]
            offsets = [offset for each in legacy for offset in each.text_offset]
            assert text == "aüü"
            assert tokens == ["a", "bytes:\\xc3", "bytes:\\xbc", "bytes:\\xc3", "bytes:\\xbc"]
            assert [value for each in legacy for value in each.token_logprobs] == [None, -1.0, -1.0, -0.25, -0.75]
            assert offsets == [0, 1, 1, 2, 2]
            assert legacy[0].top_logprobs[0] is None
            assert legacy[0].top_logprobs[1] == {"A": -0.5, "bytes:\\xc3": -1.0, "B": -9999.0}

        none = talk.completions.create(model="house", prompt="ab", echo=True, logprobs=0, max_tokens=0)
        assert none.choices[0].text == "ab"
        assert none.choices[0].finish_reason == "length"
        assert none.choices[0].logprobs is not None
        assert none.choices[0].logprobs.tokens == ["a", "b"]
        silent = talk.completions.create(model="house", prompt=[97, 98], echo=True, max_tokens=0)
        assert silent.choices[0].text == "ab"
        assert silent.choices[0].logprobs is None


async def breaks(request: GenerateRequest) -> Any:
    yield [Delta(0, 0, (65,), "A")]
    raise RequestFailed("It broke.")


def test_a_stream_that_breaks_raises() -> None:
    with live(stand(ScriptedEngine(breaks))) as made, openai.OpenAI(base_url=made.url + "/v1", api_key="x", max_retries=0) as talk:
        stream = talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "x"}], stream=True)
        got = [next(stream).choices[0].delta.content, next(stream).choices[0].delta.content]
        with pytest.raises(openai.APIError, match=r"It broke\.") as broken:
            next(stream)
        assert got == ["", "A"]
        assert broken.value.code == "request_failed"
        with pytest.raises(openai.InternalServerError):
            talk.chat.completions.create(model="house", messages=[{"role": "user", "content": "x"}])
