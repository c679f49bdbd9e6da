"""`POST /tokenize` and `POST /detokenize`."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from headrace.errors import ContextLengthExceeded, TooManyTokens, Unsupported
from headrace.http.answers import Answer, json_answer
from headrace.http.body import decode_json, read_body
from headrace.http.exchange import exchange_of
from headrace.http.native_wire import DetokenizeQuestion, TokenizeQuestion, validated
from headrace.http.problems import Fault, InvalidBody
from headrace.http.serving import Serving
from headrace.policies.prepare import INLINE_CHARACTERS, encode_messages, encode_text
from headrace.ports import Tokenizer
from headrace.served import ServedModel
from headrace.types import Message

MOST_COUNTED = 1_000_000
"""Tokens after which counting stops."""


class Tokens:
    def __init__(self, serving: Serving, body_limit: int) -> None:
        self._serving = serving
        self._body_limit = body_limit
        # Long texts go one after the other, so that they can't take all the threads that prompts are counted in.
        self._long = asyncio.Semaphore(1)

    async def tokenize(self, request: Request) -> Answer:
        """Token ids of a plain text, or of a conversation as the model's template writes it.

        What is written in the text never becomes a control token.
        """
        exchange = exchange_of(request.scope)
        body = await read_body(exchange, request.receive, self._body_limit)
        asked = validated(TokenizeQuestion, decode_json(body))
        if (asked.text is None) == (asked.messages is None):
            raise InvalidBody([Fault(("text",), "Send one of `text` and `messages`", "value_error")])
        served = self._serving.find(exchange, asked.model)
        if served.bring is not None:
            await served.bring()
        _words(served)
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in asked.messages or ())
        size = len(asked.text or "") + sum(len(message.content) for message in messages)
        try:
            if size > INLINE_CHARACTERS:
                async with self._long:
                    tokens = await _encode(served, asked.text, messages)
            else:
                tokens = await _encode(served, asked.text, messages)
        except TooManyTokens:
            raise ContextLengthExceeded(f"The text has more than {MOST_COUNTED} tokens; counting stopped there.", param="text") from None
        return json_answer({"tokens": tokens, "count": len(tokens)})

    async def detokenize(self, request: Request) -> Answer:
        """The text that token ids stand for; control tokens are shown by name."""
        exchange = exchange_of(request.scope)
        body = await read_body(exchange, request.receive, self._body_limit)
        asked = validated(DetokenizeQuestion, decode_json(body))
        served = self._serving.find(exchange, asked.model)
        if served.bring is not None:
            await served.bring()
        tokenizer = _words(served)
        if len(asked.tokens) > INLINE_CHARACTERS:
            async with self._long:
                text = await asyncio.to_thread(tokenizer.decode, asked.tokens)
        else:
            text = tokenizer.decode(asked.tokens)
        return json_answer({"text": text})


def _words(served: ServedModel) -> Tokenizer:
    if served.tokenizer is None:
        raise Unsupported(f"The model {served.public_name!r} is served by an engine that keeps its tokenizer to itself.", param="model")
    return served.tokenizer


async def _encode(served: ServedModel, text: str | None, messages: tuple[Message, ...]) -> list[int]:
    if text is not None:
        return await encode_text(served, text, limit=MOST_COUNTED)
    return await encode_messages(served, messages, limit=MOST_COUNTED)
