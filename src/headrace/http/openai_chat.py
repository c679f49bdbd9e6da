"""`POST /v1/chat/completions`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request

from headrace.call import Call
from headrace.errors import InvalidParameter, Unsupported
from headrace.http.answers import Answer, json_answer
from headrace.http.body import read_body
from headrace.http.collect import Choice, collect, finish_for_clients, timing_headers
from headrace.http.exchange import exchange_of
from headrace.http.hangup import Watch
from headrace.http.openai_answers import Head, chat_logprobs, closing, error_event, usage_of
from headrace.http.openai_nothing import CHAT, MESSAGE, PART, refuse_what_we_cannot
from headrace.http.openai_wire import (
    MOST_TOKENS,
    ChatCompletionRequest,
    ChatMessage,
    ContentPart,
    default_tokens,
    parse,
    refuse_nul,
    sampling_of,
)
from headrace.http.serving import Serving
from headrace.http.sse import json_text
from headrace.http.stream import Streamed
from headrace.served import ServedModel
from headrace.types import Delta, Event, Message, Sampling

_decoder = msgspec.json.Decoder(ChatCompletionRequest)


class ChatCompletions:
    def __init__(self, serving: Serving, body_limit: int) -> None:
        self._serving = serving
        self._body_limit = body_limit

    async def create(self, request: Request) -> Answer:
        """A conversation's next turn."""
        exchange = exchange_of(request.scope)
        asked = parse(_decoder, await read_body(exchange, request.receive, self._body_limit))
        refuse_what_we_cannot(asked, CHAT)
        messages = conversation(asked.messages)
        sampling = _sampling(asked, self._serving.chosen(exchange, asked.model))
        streams = bool(asked.stream)
        call = self._serving.call(exchange, sampling, model=asked.model, messages=messages, stream=streams, cache=asked.cache)
        calls = (call,)
        if streams:
            include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            head = Head(self._serving, calls, "chatcmpl-", "chat.completion.chunk")
            return Streamed(
                self._serving.journey.run(call),
                ChatChunks(head, call, usage=include_usage).batch,
                closing=lambda: closing(head, calls, include_usage=include_usage),
                problem=error_event,
                keep_alive=self._serving.config.server.keepalive_interval,
                call=call,
            )
        async with Watch(request.receive, exchange.line):
            collected = await collect(self._serving.journey, call)
        fields = Head(self._serving, calls, "chatcmpl-", "chat.completion").fields()
        fields["choices"] = [_choice(index, choice, logprobs=bool(asked.logprobs)) for index, choice in enumerate(collected.choices)]
        fields["usage"] = usage_of(calls)
        return json_answer(fields, headers=timing_headers(calls))


def _sampling(asked: ChatCompletionRequest, served: ServedModel) -> Sampling:
    limit = asked.max_tokens
    if asked.max_completion_tokens is not None:
        if limit is not None and limit != asked.max_completion_tokens:
            raise InvalidParameter("`max_tokens` and `max_completion_tokens` are the same thing; send one.", param="max_tokens")
        limit = asked.max_completion_tokens
    if limit == 0:
        name = "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"
        raise InvalidParameter(f"`{name}` is at least 1.", param=name)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidParameter("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return sampling_of(
        asked,
        served,
        max_tokens=default_tokens(served, MOST_TOKENS) if limit is None else limit,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
    )


def conversation(asked: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The turns as a template sees them. Raises `InvalidParameter` and `Unsupported`, naming the place."""
    messages = tuple(_message(number, message) for number, message in enumerate(asked))
    if not any(message.content or message.tool_calls for message in messages):
        raise InvalidParameter("`messages`: all of them are empty.", param="messages")
    return messages


def _message(number: int, asked: ChatMessage) -> Message:
    place = f"messages[{number}]."
    refuse_what_we_cannot(asked, MESSAGE, place)
    content = asked.content
    if isinstance(content, list):
        content = _joined(number, content)
    elif content is None:
        if asked.role != "assistant":
            raise InvalidParameter(f"`{place}content` is required for the role {asked.role}.", param=place + "content")
        content = ""
    refuse_nul(content, ("messages", number, "content"))
    if asked.role == "tool" and asked.tool_call_id is None:
        raise InvalidParameter(f"`{place}tool_call_id` is required for the role tool.", param=place + "tool_call_id")
    if asked.role != "tool" and asked.tool_call_id is not None:
        raise InvalidParameter(f"`{place}tool_call_id` is only for the role tool.", param=place + "tool_call_id")
    if asked.role != "assistant" and asked.tool_calls:
        raise InvalidParameter(f"`{place}tool_calls` is only for the role assistant.", param=place + "tool_calls")
    if asked.name is not None:
        refuse_nul(asked.name, ("messages", number, "name"))
    calls: tuple[dict[str, Any], ...] = ()
    if asked.tool_calls:
        calls = tuple(msgspec.to_builtins(each) for each in asked.tool_calls)
        for each in asked.tool_calls:
            refuse_nul(each.id + each.function.name + each.function.arguments, ("messages", number, "tool_calls"))
    return Message(role=asked.role, content=content, name=asked.name, tool_call_id=asked.tool_call_id, tool_calls=calls)


def _joined(number: int, parts: Sequence[ContentPart]) -> str:
    texts: list[str] = []
    for index, part in enumerate(parts):
        place = f"messages[{number}].content[{index}]"
        if part.type != "text":
            raise Unsupported(f"`{place}.type`: parts of type {part.type[:40]!r} are not served here, only text.", param=place + ".type")
        refuse_what_we_cannot(part, PART, place + ".")
        if part.text is None:
            raise InvalidParameter(f"`{place}.text`: Field required", param=place + ".text")
        texts.append(part.text)
    return "".join(texts)


def _choice(index: int, choice: Choice, *, logprobs: bool) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": {"content": chat_logprobs(choice.logprobs), "refusal": None} if logprobs else None,
        "finish_reason": choice.finish,
    }


class ChatChunks:
    """Events as chunks: the role first, then pieces of text, then why it ended. One choice's tokens in a batch are one chunk.

    All but the text is encoded once for the whole stream.
    """

    __slots__ = ("_after_text", "_begun", "_call", "_head", "_opening", "_tail", "_texts", "_usage")

    def __init__(self, head: Head, call: Call, *, usage: bool) -> None:
        self._head = head
        self._call = call
        self._usage = usage
        self._begun = False

    def batch(self, events: list[Event]) -> bytes:
        out = b"" if self._begun else self._begin()
        if len(events) == 1 and type(event := events[0]) is Delta:
            if event.text and event.finish is None and not event.logprobs:
                return out + self._texts[event.choice] + json_text(event.text) + self._after_text
            return out + self._chunk(event)
        # A kept answer comes all at once, and is still to look like a stream.
        kept = self._call.outcome.served_from == "cache"
        deltas = [event for event in events if isinstance(event, Delta)] if kept else _merged(events)
        return out + b"".join(map(self._chunk, deltas))

    def _begin(self) -> bytes:
        self._begun = True
        self._opening = self._head.opening()
        self._tail = b'],"usage":null}\n\n' if self._usage else b"]}\n\n"
        self._after_text = b'},"logprobs":null,"finish_reason":null}' + self._tail
        choices = range(self._call.sampling.n)
        self._texts = tuple([self._opening + b'{"index":%d,"delta":{"content":' % choice for choice in choices])
        role = b'{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}'
        return b"".join(self._opening + role % choice + self._tail for choice in choices)

    def _chunk(self, delta: Delta) -> bytes:
        out = b""
        if delta.logprobs:
            scored = msgspec.json.encode({"content": chat_logprobs(delta.logprobs), "refusal": None})
            out = self._texts[delta.choice] + json_text(delta.text) + b'},"logprobs":' + scored + b',"finish_reason":null}' + self._tail
        elif delta.text:
            out = self._texts[delta.choice] + json_text(delta.text) + self._after_text
        if delta.finish is not None:
            reason = finish_for_clients(delta.finish).encode()
            out += self._opening + b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%b"}' % (delta.choice, reason) + self._tail
        return out


def _merged(events: Sequence[Event]) -> list[Delta]:
    """One delta for each choice."""
    merged: dict[int, Delta] = {}
    for event in events:
        if isinstance(event, Delta):
            before = merged.get(event.choice)
            merged[event.choice] = event if before is None else joined(before, event)
    return list(merged.values())


def joined(one: Delta, next_one: Delta) -> Delta:
    return Delta(
        choice=one.choice,
        index=one.index,
        tokens=one.tokens + next_one.tokens,
        text=one.text + next_one.text,
        finish=next_one.finish or one.finish,
        stop_reason=next_one.stop_reason if next_one.stop_reason is not None else one.stop_reason,
        logprobs=one.logprobs + next_one.logprobs,
    )
