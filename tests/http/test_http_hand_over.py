"""Tokens that an engine hands over are written the moment they are there; all else is as if they had been read."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from serving_echo import ScriptedEngine, live, stand

from headrace.types import Delta, Event, FinishReason, GenerateRequest, Report

WORDS = [f"word{number} " for number in range(40)]


def said(number: int, finish: FinishReason | None = None) -> list[Event]:
    return [Delta(0, number, (number,), WORDS[number], finish)]


class Handing:
    """As the client of a worker: the first batch is read, as is the last, and the others are offered first."""

    def __init__(self, engine: HandingEngine, batches: list[list[Event]]) -> None:
        self._engine = engine
        self._batches = batches
        self._take: Callable[[list[Event]], bool] | None = None
        self._stopped: list[Exception | None] = []

    def __aiter__(self) -> Handing:
        return self

    async def __anext__(self) -> list[Event]:
        while self._batches:
            await asyncio.sleep(0)
            if self._take is None or len(self._batches) == 1 or not self._take(self._batches[0]):
                return self._batches.pop(0)
            self._engine.taken += 1
            self._batches.pop(0)
            if self._stopped:
                raise self._stopped[0] or StopAsyncIteration
            if self._engine.endless and len(self._batches) == 2:
                self._batches.insert(0, said(1))
        raise StopAsyncIteration

    def hand_to(self, take: Callable[[list[Event]], bool]) -> None:
        self._take = take

    def stop(self, error: Exception | None = None) -> None:
        self._stopped.append(error)

    async def aclose(self) -> None:
        self._engine.closed.set()


class HandingEngine(ScriptedEngine):
    def __init__(self, batches: list[list[Event]], *, endless: bool = False) -> None:
        super().__init__(lambda request: iter(()))  # type: ignore[arg-type, return-value]
        self.batches = batches
        self.endless = endless
        self.taken = 0

    def generate(self, request: GenerateRequest) -> Any:
        return Handing(self, [*self.batches])


@pytest.fixture
def batches() -> list[list[Event]]:
    *firsts, last = range(len(WORDS))
    return [*map(said, firsts), [*said(last, "stop"), Report(3, 0, len(WORDS), 1.0, 1.0, 1.0)]]


CHAT = {"messages": [{"role": "user", "content": "Say it."}], "temperature": 1, "stream_options": {"include_usage": True}}


def chunks(text: str) -> list[Any]:
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(event) for event in events if event != "[DONE]"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/chat/stream", "/chat"])
def test_what_is_handed_over_arrives_whole_and_in_order(path: str, batches: list[list[Event]]) -> None:
    engine = HandingEngine(batches)
    asked: dict[str, Any] = {"prompt": "Say it.", "temperature": 1}
    if path.startswith("/v1"):
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    if "chat/c" in path:
        asked = CHAT | {"stream": True}
    with live(stand(engine)) as made:
        answer = httpx.post(made.url + path, json=asked, timeout=20)
    assert answer.status_code == 200
    whole = "".join(WORDS)
    if path == "/v1/chat/completions":
        got = chunks(answer.text)
        assert "".join(each["choices"][0]["delta"].get("content", "") for each in got if each["choices"]) == whole
        assert got[-1]["usage"]["completion_tokens"] == len(WORDS)
        assert answer.text.endswith("data: [DONE]\n\n")
    elif path == "/v1/completions":
        got = chunks(answer.text)
        assert "".join(each["choices"][0]["text"] for each in got if each["choices"]) == whole
        assert got[-1]["usage"]["completion_tokens"] == len(WORDS)
    elif path == "/chat/stream":
        pieces, _, _ = answer.text.partition(": queue")
        assert "".join(line.removeprefix("data: ") for line in pieces.splitlines() if line) == whole
    else:
        assert answer.json()["response"] == whole
    assert engine.taken == len(WORDS) - 2  # all but the first and the last
    assert engine.closed.is_set()


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_of_what_is_handed_over_is_its_own_request_s(stream: bool, batches: list[list[Event]]) -> None:
    engine = HandingEngine([*batches[:5], said(5, "error"), *batches[5:]])
    with live(stand(engine)) as made:
        answer = httpx.post(made.url + "/chat/stream" if stream else made.url + "/chat", json={"prompt": "Say it."}, timeout=20)
        assert engine.closed.is_set()
        if stream:
            assert "".join(WORDS[:5]) in answer.text.replace("data: ", "").replace("\n", "")
            assert "event: error" in answer.text
        else:
            assert answer.status_code == 500
            assert answer.json()["code"] == "request_failed"
        engine.batches = batches
        assert httpx.post(made.url + "/chat", json={"prompt": "And now?"}, timeout=20).json()["response"] == "".join(WORDS)


def test_a_hang_up_ends_what_is_handed_over(batches: list[list[Event]]) -> None:
    engine = HandingEngine(batches, endless=True)
    with live(stand(engine)) as made, httpx.Client(base_url=made.url, timeout=20) as http:
        with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            lines = answer.iter_lines()
            for _ in range(100):
                next(lines)
            assert not engine.closed.is_set()
        assert engine.closed.wait(10)
    assert engine.taken > 20


def test_an_answer_that_is_not_streamed_ends_with_its_client_too() -> None:
    begun = threading.Event()

    async def never(request: GenerateRequest) -> Any:
        begun.set()
        await asyncio.Event().wait()
        yield []

    engine = ScriptedEngine(never)
    with live(stand(engine)) as made, httpx.Client(base_url=made.url, timeout=httpx.Timeout(20, read=0.3)) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/chat", json={"prompt": "Say nothing."})
        assert begun.is_set()
        http.close()
        assert engine.closed.wait(10)
