"""Each bad input is refused with the right status, by name, quickly; and a stream running beside it never notices."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from serving_echo import CONTEXT, ScriptedEngine, client, live, stand

HELLO = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> Any:
    return {"messages": HELLO, **fields}


def content(value: Any) -> Any:
    return {"messages": [{"role": "user", "content": value}]}


OPENAI_CHAT: list[tuple[Any, str | None]] = [
    # (body, the parameter that the error names)
    ({}, "messages"),
    ([], None),
    (5, None),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [5]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ({"messages": [{"role": "user", "content": "Hi", "foo": 1}]}, "messages[0].foo"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].tool_call_id"),
    (content(5), "messages[0].content"),
    (content("a\0b"), "messages[0].content"),
    (content([{"type": "image_url", "image_url": {"url": "x"}}]), "messages[0].content[0].type"),
    (content([{"type": "text"}]), "messages[0].content[0].text"),
    (content([{"type": "text", "text": "x", "foo": 1}]), "messages[0].content[0].foo"),
    (content([{"type": "text", "text": "x", "image_url": {"url": "x"}}]), "messages[0].content[0].image_url"),
    (content([{"type": "refusal", "refusal": "x"}]), "messages[0].content[0].type"),
    (content("x" * (CONTEXT + 1)), "messages"),
    (chat(foo=1), "foo"),
    (chat(model=5), "model"),
    (chat(temperature="hot"), "temperature"),
    (chat(temperature=2.1), "temperature"),
    (chat(temperature=-0.1), "temperature"),
    (chat(top_p=-0.1), "top_p"),
    (chat(top_p=1.1), "top_p"),
    (chat(top_k=-2), "top_k"),
    (chat(min_p=1.5), "min_p"),
    (chat(presence_penalty=3), "presence_penalty"),
    (chat(frequency_penalty=-3), "frequency_penalty"),
    (chat(repetition_penalty=0), "repetition_penalty"),
    (chat(n=0), "n"),
    (chat(n=17), "n"),
    (chat(n=10**9), "n"),
    (chat(n=10**40), "n"),
    (chat(n=1.5), "n"),
    (chat(n=True), "n"),
    (chat(seed=2**64), "seed"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=10**9), "max_tokens"),
    (chat(max_completion_tokens=10**9), "max_completion_tokens"),
    (chat(max_tokens=5, max_completion_tokens=6), "max_tokens"),
    (chat(min_tokens=6, max_tokens=5), "min_tokens"),
    (chat(stop=""), "stop"),
    (chat(stop=["a"] * 5), "stop"),
    (chat(stop=["a\0"]), "stop"),
    (chat(stop_token_ids=[259]), "stop_token_ids"),
    (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"٣": 1}), "logit_bias"),
    (chat(logit_bias={"259": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias"),
    (chat(top_logprobs=5), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=2), "logprobs"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options={"foo": True}), "stream_options.foo"),
    (chat(stream=True, stream_options={"include_obfuscation": True}), "stream_options.include_obfuscation"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), "tools"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(response_format={"type": "json_object"}), "response_format"),
    (chat(store=True), "store"),
    (chat(store=0), "store"),
    (chat(service_tier="priority"), "service_tier"),
    (chat(modalities=["text", "audio"]), "modalities"),
    (chat(audio={"voice": "x"}), "audio"),
    (chat(reasoning_effort="high"), "reasoning_effort"),
    (chat(verbosity="low"), "verbosity"),
    (chat(user=5), "user"),
    (chat(metadata="x"), "metadata"),
    (chat(web_search_options={}), "web_search_options"),
]

OPENAI_COMPLETIONS: list[tuple[Any, str | None]] = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [259]}, "prompt"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [[5], [10**9]]}, "prompt[1]"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": "a\0"}, "prompt"),
    ({"prompt": "x" * (CONTEXT + 1)}, "prompt"),
    ({"prompt": [5] * (CONTEXT + 1)}, "prompt"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
    ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "messages": HELLO}, "messages"),
]

NATIVE: list[tuple[Any, list[Any]]] = [
    # (body, where the first fault is)
    ({}, ["prompt"]),
    ([], []),
    ({"prompt": ""}, ["prompt"]),
    ({"prompt": 5}, ["prompt"]),
    ({"prompt": "a\0"}, ["prompt"]),
    ({"prompt": "x", "foo": 1}, ["foo"]),
    ({"prompt": "x", "foo[0]": 1}, ["foo[0]"]),
    ({"prompt": "x", "max_length": 0}, ["max_length"]),
    ({"prompt": "x", "max_length": 10**9}, ["max_length"]),
    ({"prompt": "x", "max_length": "many"}, ["max_length"]),
    ({"prompt": "x", "temperature": 3}, ["temperature"]),
    ({"prompt": "x", "temperature": "hot"}, ["temperature"]),
    ({"prompt": "x", "top_p": -0.1}, ["top_p"]),
    ({"prompt": "x", "seed": 10**40}, ["seed"]),
    ({"prompt": "x", "stop": [""]}, ["stop"]),
    ({"prompt": "x", "stop": ["a"] * 5}, ["stop"]),
    ({"prompt": "x", "history": 5}, ["history"]),
    ({"prompt": "x", "history": [["only one"]]}, ["history", 0]),
    ({"prompt": "x", "history": [{"role": "robot", "content": "x"}]}, ["history", 0, "role"]),
    ({"prompt": "x", "model": 5}, ["model"]),
]


@pytest.mark.anyio
async def test_openai_refusals_name_the_parameter() -> None:
    async with client(stand()) as http:
        for path, table in (("/v1/chat/completions", OPENAI_CHAT), ("/v1/completions", OPENAI_COMPLETIONS)):
            for body, param in table:
                answer = await http.post(path, json=body)
                assert answer.status_code == 400, (body, answer.text)
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["param"] == param, (str(body)[:100], error)
                assert error["type"] == "invalid_request_error"
                assert len(answer.content) < 1000


@pytest.mark.anyio
async def test_native_refusals_name_the_field() -> None:
    async with client(stand()) as http:
        for body, where in NATIVE:
            answer = await http.post("/chat", json=body)
            assert answer.status_code == 422, (body, answer.text)
            first = answer.json()["detail"][0]
            assert first["loc"][: 1 + len(where)] == ["body", *where], (body, first)
            assert {"loc", "msg", "type"} <= set(first)
            told = {str(part) for fault in answer.json()["detail"] for part in fault["loc"]}
            assert not any("[" in part and part not in body for part in told), (body, told)


@pytest.mark.anyio
async def test_the_context_is_named_with_both_counts() -> None:
    async with client(stand()) as http:
        for path, body in (("/chat", {"prompt": "x" * 5000}), ("/v1/completions", {"prompt": [5] * 5000})):
            answer = await http.post(path, json=body)
            assert answer.status_code == 400
            assert str(CONTEXT) in answer.text
            assert "50" in answer.text
            assert "context_length_exceeded" in answer.text


@pytest.mark.anyio
async def test_an_unknown_model_is_404_and_names_those_that_exist() -> None:
    async with client(stand()) as http:
        for path, body in (
            ("/chat", {"prompt": "x", "model": "no"}),
            ("/v1/chat/completions", chat(model="no")),
            ("/v1/completions", {"prompt": "x", "model": "no" * 10000}),
            ("/tokenize", {"text": "x", "model": "../../etc"}),
        ):
            answer = await http.post(path, json=body)
            assert answer.status_code == 404
            assert "house" in answer.text
            assert len(answer.content) < 1000


@pytest.mark.anyio
async def test_what_asks_for_nothing_is_accepted() -> None:
    nothing = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": {},
        "stop": None,
        "n": None,
        "max_tokens": None,
        "functions": None,
        "audio": None,
        "prediction": None,
        "reasoning_effort": None,
        "verbosity": "medium",
        "safety_identifier": "x",
        "prompt_cache_key": "x",
        "web_search_options": None,
        "stream": False,
        "stream_options": None,
        "temperature": None,
        "logprobs": False,
        "top_k": -1,
    }
    async with client(stand()) as http:
        answer = await http.post("/v1/chat/completions", json=chat(**nothing))
        assert answer.status_code == 200, answer.text
        history = answer.json()["choices"][0]["message"] | {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
        again = await http.post("/v1/chat/completions", json={"messages": [*HELLO, history, *HELLO]})
        assert again.status_code == 200, again.text
        plain = await http.post("/v1/completions", json={"prompt": "a", "best_of": 1, "suffix": None, "user": "me"})
        assert plain.status_code == 200, plain.text


@pytest.mark.anyio
async def test_the_ends_of_ranges_are_in_them() -> None:
    async with client(stand()) as http:
        for asked in ({"temperature": 0, "top_p": 0}, {"temperature": 2, "top_p": 1}):
            assert (await http.post("/v1/chat/completions", json=chat(**asked))).status_code == 200
            assert (await http.post("/v1/completions", json={"prompt": "a", **asked})).status_code == 200
            assert (await http.post("/chat", json={"prompt": "a", **asked})).status_code == 200


RAW: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("cut short", b'{"messages": [{"role"'),
    ("no JSON", b"prompt=hello"),
    ("not UTF-8", b'{"prompt": "\xff", "messages": [{"role": "user", "content": "\xff"}]}'),
    ("NaN", b'{"temperature": NaN}'),
    ("infinite", b'{"temperature": -Infinity}'),
    ("larger than a float", b'{"temperature": 1e999}'),
    ("lone surrogate", b'{"prompt": "\\ud800", "messages": [{"role": "user", "content": "\\ud800"}]}'),
    ("lone low surrogate", b'{"prompt": "\\udc00 abcdef", "messages": [{"role": "user", "content": "\\udc00 abcdef"}]}'),
    ("nested arrays", b"[" * 100_000 + b"]" * 100_000),
    ("nested in a field", b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("nested objects", b'{"prompt": ' + b'{"a": ' * 100_000 + b"1" + b"}" * 100_001),
    ("nested and never closed", b'{"prompt": ' + b"[" * 4_000_000),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("name", "body"), RAW, ids=[name for name, _ in RAW])
async def test_what_is_no_json_is_refused(name: str, body: bytes) -> None:
    async with client(stand()) as http:
        for path, status in (
            ("/v1/chat/completions", 400),
            ("/v1/completions", 400),
            ("/chat", 422),
            ("/chat/batch", 422),
            ("/tokenize", 422),
        ):
            answer = await http.post(path, content=body)
            assert answer.status_code == status, (path, answer.text[:300])
            assert len(answer.content) < 3000
            if status == 422:
                assert answer.json()["detail"][0]["loc"][0] == "body"


@pytest.mark.anyio
async def test_forms_are_not_json() -> None:
    async with client(stand()) as http:
        assert (await http.post("/chat", data={"prompt": "x"})).status_code == 422
        assert (await http.post("/v1/completions", content=b'{"prompt":"x"}', headers={"Content-Type": "text/plain"})).status_code == 400
        typed = {"Content-Type": "application/json; charset=utf-8"}
        assert (await http.post("/v1/completions", content=b'{"prompt":"x"}', headers=typed)).status_code == 200


@pytest.mark.anyio
async def test_bodies_over_the_limit_are_413_with_and_without_a_length() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 65536

    async with client(stand(max_body_mib=1)) as http:
        for path in ("/chat", "/v1/completions", "/tokenize"):
            told = await http.post(path, content=b"x" * 1_048_577)
            untold = await http.post(path, content=chunks())
            for answer in (told, untold):
                assert answer.status_code == 413
                assert "body_too_large" in answer.text
                assert "x-request-id" in answer.headers


def big(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


HOSTILE: list[tuple[str, Callable[[], bytes]]] = [
    ("a million stop strings", lambda: big({"prompt": "x", "stop": ["a"] * 1_000_000})),
    ("200,000 fields", lambda: big({f"k{n}": 1 for n in range(200_000)})),
    ("200,000 fields inside", lambda: big({"prompt": "x", "messages": HELLO, "metadata": {f"k{n}": 1 for n in range(200_000)}})),
    ("200,000 biases", lambda: big({"prompt": "x", "messages": HELLO, "logit_bias": {str(n): 1 for n in range(200_000)}})),
    ("one long string", lambda: big({"prompt": "x" * 8_000_000})),
    ("one long message", lambda: big({"messages": [{"role": "user", "content": "x" * 8_000_000}]})),
    ("one long name", lambda: big({"k" * 8_000_000: 1})),
    ("two million numbers", lambda: big({"prompt": [1] * 2_000_000})),
    ("200,000 numbers", lambda: big({"prompt": [1] * 199_999})),
    ("many messages", lambda: big({"messages": [{"role": "user", "content": ""}] * 140_000})),
    ("as many turns as pass", lambda: big({"prompt": "x", "history": [["a", "b"]] * 39_000})),
    ("many turns", lambda: big({"prompt": "x", "history": [["a", "b"]] * 140_000})),
    ("a turn with many fields", lambda: big({"prompt": "x", "history": [{f"k{n}": 1 for n in range(200_000)}]})),
    ("many wrong turns", lambda: big({"prompt": "x", "history": [5] * 290_000})),
    ("nested", lambda: b"[" * 8_000_000),
    ("commas", lambda: b"," * 8_000_000),
]


@dataclass
class Neighbour:
    """A stream that gets a token every 5 ms, and writes down when each came."""

    worst: float = 0.0
    tokens: int = 0


def watch_neighbour(url: str, neighbour: Neighbour, stop: threading.Event) -> None:
    with httpx.Client(timeout=60) as http, http.stream("POST", url + "/chat/stream", json={"prompt": "x"}) as answer:
        last = time.monotonic()
        for piece in answer.iter_raw():
            now = time.monotonic()
            neighbour.tokens += piece.count(b"data: ")
            neighbour.worst = max(neighbour.worst, now - last)
            last = now
            if stop.is_set():
                break


@pytest.mark.slow
def test_a_stream_beside_hostile_bodies_never_notices() -> None:
    from headrace.types import Delta, GenerateRequest

    async def ticking(request: GenerateRequest) -> Any:
        for index in range(100_000):
            await asyncio.sleep(0.005)
            yield [Delta(0, index, (65,), "A")]

    bodies = [(name, make()) for name, make in HOSTILE]
    with live(stand(ScriptedEngine(ticking))) as made:
        stop, neighbour = threading.Event(), Neighbour()
        beside = threading.Thread(target=watch_neighbour, args=(made.url, neighbour, stop))
        beside.start()
        try:
            with httpx.Client(base_url=made.url, timeout=60) as http:
                while neighbour.tokens < 3:
                    time.sleep(0.005)
                # What sending 8 MiB to oneself costs on this machine is no fault of the server's parsing.
                for name, body in bodies:
                    for path in ("/chat", "/v1/chat/completions", "/v1/completions", "/tokenize"):
                        begun = time.monotonic()
                        answer = http.post(path, content=body)
                        took = time.monotonic() - begun
                        assert answer.status_code in (400, 422), (name, path, answer.status_code)
                        assert len(answer.content) < 5000, (name, path)
                        assert took < 1, (name, path, took)
        finally:
            stop.set()
            beside.join()
    # A blocked event loop shows in seconds; less than that is a busy machine.
    assert neighbour.worst < 3, neighbour
