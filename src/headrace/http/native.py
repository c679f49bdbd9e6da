"""The tutorial's routes: `/chat`, `/chat/stream`, `/chat/batch`, `/chat/secure`."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import structlog
from starlette.requests import Request

from headrace.call import Call
from headrace.errors import HeadraceError, ModelNotFound
from headrace.http.answers import Answer, json_answer
from headrace.http.body import decode_json, read_body
from headrace.http.collect import collect, finish_for_clients, notes, timing, timing_headers
from headrace.http.exchange import Exchange, exchange_of
from headrace.http.hangup import Watch
from headrace.http.merge import together
from headrace.http.native_wire import ChatQuestion, validated
from headrace.http.problems import Fault, InvalidBody, native_error, status_of, unexpected
from headrace.http.serving import Serving
from headrace.http.sse import TextEvents, comment, named_event
from headrace.http.stream import Streamed
from headrace.types import Delta, Event, Sampling


class NativeChat:
    def __init__(self, serving: Serving, body_limit: int) -> None:
        self._serving = serving
        self._body_limit = body_limit

    async def chat(self, request: Request) -> Answer:
        """Answer a question, whole."""
        return await self._answer(request, key_required=False)

    async def secure(self, request: Request) -> Answer:
        """As `/chat`, for callers with a key."""
        return await self._answer(request, key_required=True)

    async def stream(self, request: Request) -> Answer:
        """Answer a question piece by piece, as server-sent events.

        Each event's data is the next piece of text. The last is `event: done` with `{"tokens_used", "processing_time",
        "finish_reason"}`, or `event: error` with `{"detail", "code"}`. SSE can't carry a carriage return: CR and CRLF become a newline.
        """
        exchange = exchange_of(request.scope)
        question = validated(ChatQuestion, decode_json(await read_body(exchange, request.receive, self._body_limit)))
        call = self._call(exchange, question, stream=True)
        return Streamed(
            self._serving.journey.run(call),
            TextPieces().batch,
            closing=lambda: _done(call),
            problem=lambda error: named_event(b"error", msgspec.json.encode(native_error(error))),
            keep_alive=self._serving.config.server.keepalive_interval,
            call=call,
        )

    async def batch(self, request: Request) -> Answer:
        """Answer a list of questions, side by side in one batch.

        The results are in order. An item that fails, its validation too, has `{"error": …}` for a result and doesn't touch the others.
        An empty list has no results.
        """
        exchange = exchange_of(request.scope)
        questions = decode_json(await read_body(exchange, request.receive, self._body_limit))
        if not isinstance(questions, list):
            raise InvalidBody([Fault((), "Input should be a valid list", "list_type")])
        most = self._serving.config.server.max_batch
        if len(questions) > most:
            message = f"List should have at most {most} items, not {len(questions)} (max_batch)"
            raise InvalidBody([Fault((), message, "too_long")])
        self._serving.wishes(exchange)
        exchange.items = len(questions)
        async with Watch(request.receive, exchange.line):
            results = await together([self._item(exchange, number, question) for number, question in enumerate(questions)])
        return json_answer({"results": results}, headers=timing_headers(exchange.calls))

    async def _answer(self, request: Request, *, key_required: bool) -> Answer:
        exchange = exchange_of(request.scope)
        question = validated(ChatQuestion, decode_json(await read_body(exchange, request.receive, self._body_limit)))
        call = self._call(exchange, question, key_required=key_required)
        async with Watch(request.receive, exchange.line):
            reply = await self._reply(call, question)
        return json_answer(reply, headers=timing_headers((call,)))

    async def _item(self, exchange: Exchange, number: int, data: Any) -> dict[str, Any]:
        try:
            question = validated(ChatQuestion, data, (number,))
            return await self._reply(self._call(exchange, question), question)
        except HeadraceError as error:
            return _failed(error)
        except Exception:  # noqa: BLE001 - the edge of one item: it is logged, and the others go on
            structlog.get_logger("headrace.http").exception("batch item failed", request_id=exchange.id, item=number)
            return _failed(unexpected())

    def _call(self, exchange: Exchange, question: ChatQuestion, *, stream: bool = False, key_required: bool = False) -> Call:
        return self._serving.call(
            exchange,
            self._sampling(exchange, question),
            model=question.model,
            messages=question.messages(),
            stream=stream,
            cache=question.cache,
            key_required=key_required,
        )

    def _sampling(self, exchange: Exchange, question: ChatQuestion) -> Sampling:
        """What the question says, and of the rest what the model's section in the configuration does."""
        if not self._serving.models.several:
            return question.sampling()
        try:
            entry = self._serving.chosen(exchange, question.model).entry
        except ModelNotFound:
            entry = None  # the journey says so
        return question.sampling(entry)

    async def _reply(self, call: Call, question: ChatQuestion) -> dict[str, Any]:
        choice = (await collect(self._serving.journey, call)).choices[0]
        response = choice.text
        return {
            "response": response,
            "history": question.history_with(response),
            **_cost(call),
            "model": self._serving.served(call).public_name,
            "finish_reason": choice.finish,
        }


def _cost(call: Call) -> dict[str, Any]:
    return {
        "tokens_used": call.outcome.prompt_tokens + call.outcome.completion_tokens,
        "processing_time": round(time.monotonic() - call.started_at, 6),
    }


def _done(call: Call) -> bytes:
    said = timing((call,))
    end = named_event(b"done", msgspec.json.encode({**_cost(call), "finish_reason": call.outcome.finish or "stop"}))
    return notes((call,)) + (comment(said) if said else b"") + end


def _failed(error: HeadraceError) -> dict[str, Any]:
    told: dict[str, Any] = {"status": status_of(error, openai=False), "code": error.code, "message": error.told}
    if isinstance(error, InvalidBody):
        told["detail"] = native_error(error)["detail"]
    return {"error": told}


class TextPieces:
    """Events as the text of their one choice."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events = TextEvents()

    def batch(self, events: list[Event]) -> bytes:
        text = ""
        for event in events:
            if isinstance(event, Delta):
                text += event.text
                if event.finish is not None:
                    finish_for_clients(event.finish)
        return self._events.event(text)
