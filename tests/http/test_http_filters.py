"""Filters over HTTP: prompts refused, answers masked or ended, and callers told."""

from __future__ import annotations

import json

import pytest
from serving_echo import client, stand
from strict_sse import parse

from headrace.config import FilterSection

pytestmark = pytest.mark.anyio

MASKING = FilterSection(deny_output=("secret",), pii_output="mask", report_filters=True)


async def test_answers_are_masked_and_callers_told_and_it_is_counted() -> None:
    async with client(stand(filters=MASKING)) as http:
        answer = await http.post("/chat", json={"prompt": "the secret is me@example.org"})
        assert answer.json()["response"] == "the *** is ***"
        assert answer.headers["x-headrace-filter"] == "deny=1,email=1"
        metrics = (await http.get("/metrics")).text
        assert 'headrace_filter_actions_total{action="mask",kind="email",stage="output"} 1.0' in metrics


async def test_streams_never_hold_a_piece_of_a_match_and_say_so_at_the_end() -> None:
    async with client(stand(filters=MASKING)) as http:
        native = await http.post("/chat/stream", json={"prompt": "the secret is out"})
        texts = [data for name, data in parse(native.content).events if name == "message"]
        assert "".join(texts) == "the *** is out"
        assert ": X-Headrace-Filter: deny=1" in native.text
        body = {"messages": [{"role": "user", "content": "a secret, b"}], "stream": True}
        openai = await http.post("/v1/chat/completions", json=body)
        chunks = [json.loads(data) for _, data in parse(openai.content).events if data != "[DONE]"]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == "a ***, b"


async def test_a_block_ends_the_answer() -> None:
    blocking = FilterSection(deny_output=("secret",), deny_action="block")
    async with client(stand(filters=blocking)) as http:
        body = {"messages": [{"role": "user", "content": "the secret is out"}]}
        choice = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("the ", "content_filter")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_is_repeated_passes_the_filters(stream: bool) -> None:
    async def repeated(filters: FilterSection) -> tuple[str, str, str]:
        async with client(stand(filters=filters)) as http:
            body = {"prompt": "a secret of me@example.org", "echo": True, "stream": stream, "max_tokens": 100}
            answer = await http.post("/v1/completions", json=body)
            metrics = (await http.get("/metrics")).text
        chunks = [json.loads(data) for _, data in parse(answer.content).events if data != "[DONE]"] if stream else [answer.json()]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"], metrics

    text, finish, _ = await repeated(FilterSection(pii_input="mask"))
    assert (text, finish) == ("a secret of ***" * 2, "stop")
    text, finish, metrics = await repeated(MASKING)
    assert (text, finish) == ("a *** of ***" * 2, "stop")
    assert 'headrace_filter_actions_total{action="mask",kind="email",stage="output"} 2.0' in metrics
    text, finish, _ = await repeated(FilterSection(deny_output=("secret",), deny_action="block"))
    assert (text, finish) == ("a ", "content_filter")


async def test_a_denied_prompt_is_refused_before_the_engine() -> None:
    async with client(stand(filters=FilterSection(deny_input=("forbidden",), filter_input_max_chars=50))) as http:
        denied = await http.post("/v1/completions", json={"prompt": "a FORBIDDEN word"})
        assert (denied.status_code, denied.json()["error"]["code"]) == (400, "content_filter")
        long = await http.post("/chat", json={"prompt": "x" * 51})
        assert (long.status_code, "51" in long.json()["detail"]) == (400, True)
