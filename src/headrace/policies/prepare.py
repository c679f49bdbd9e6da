"""Makes the engine's request: finds the model, renders the template, counts tokens, and fits them into the context."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from headrace.call import Call
from headrace.config import ServerSection
from headrace.errors import ContextLengthExceeded, InvalidParameter, ModelNotLoaded, TooManyTokens, Unsupported
from headrace.policies.prompt_memo import PromptMemo
from headrace.served import ServedModel, ServedModels
from headrace.types import EngineCard, GenerateRequest, Message, Sampling
from headrace.unwinding import before

INLINE_CHARACTERS = 4096
"""Texts up to this are encoded on the event loop (about 2 ms at most); longer ones go to a thread."""

_NEEDS = (
    ("logprobs", lambda s: s.logprobs is not None),
    ("prompt_logprobs", lambda s: s.prompt_logprobs is not None),
    ("logit_bias", lambda s: bool(s.logit_bias)),
    ("seed", lambda s: s.seed is not None),
    ("n", lambda s: s.n > 1),
    ("top_k", lambda s: s.top_k > 0),
    ("min_p", lambda s: s.min_p > 0),
    ("repetition_penalty", lambda s: s.repetition_penalty != 1),
    ("min_tokens", lambda s: s.min_tokens > 0),
    ("ignore_eos", lambda s: s.ignore_eos),
    ("stop_token_ids", lambda s: bool(s.stop_token_ids)),
)


class Prepare:
    """Sets `call.request` and `call.served_model`.

    Raises `ModelNotFound`, `Unsupported`, `InvalidParameter`, and `ContextLengthExceeded` with the limit and the count.
    """

    def __init__(self, models: ServedModels, server: ServerSection) -> None:
        self._models = models
        self._timeout = server.request_timeout
        self._memo = PromptMemo()

    @before
    async def __call__(self, call: Call) -> None:
        model = self._models.find(call.model)
        call.served_model = model.files.name
        call.deadline = call.started_at + (self._timeout if call.timeout is None else min(call.timeout, self._timeout))
        if model.bring is not None:
            await _bring(model, call)
        if model.card is not None:
            refuse_unsupported(model.card, call.sampling)
        if model.tokenizer is None:
            if call.tokens is not None:
                raise Unsupported(f"The model {model.public_name!r} is served by an engine that takes text, not token ids.", param="prompt")
            call.request = GenerateRequest(
                id=call.id,
                prompt=[],
                sampling=call.sampling,
                tenant=call.tenant,
                timeout=call.seconds_left(),
                priority=call.priority,
                messages=call.messages or (),
                text=call.text,
            )
        else:
            limit = context_length(model)
            prompt = await self._prompt(call, model, limit)
            call.request = GenerateRequest(
                id=call.id,
                prompt=prompt,
                sampling=fit(call, len(prompt), limit),
                tenant=call.tenant,
                timeout=call.seconds_left(),
                priority=call.priority,
            )
            call.outcome.prompt_tokens = len(prompt)

    async def _prompt(self, call: Call, model: ServedModel, limit: int) -> list[int]:
        if call.tokens is not None:
            return await self._encoded(call, model, limit)
        key = (model.files.name, call.tenant, limit, call.messages, call.text)
        prompt = self._memo.get(key)
        if prompt is None:
            prompt = await self._encoded(call, model, limit)
            size = len(call.text) if call.text is not None else sum(len(message.content) for message in call.messages or ())
            self._memo.put(key, size, prompt)
        return prompt

    async def _encoded(self, call: Call, model: ServedModel, limit: int) -> list[int]:
        try:
            if call.messages is not None:
                return await encode_messages(model, call.messages, limit=limit)
            if call.text is not None:
                assert model.tokenizer is not None
                return [*model.tokenizer.bos_ids, *await encode_text(model, call.text, limit=limit)]
        except TooManyTokens as error:
            raise too_long(call, limit, f"at least {error.at_least}") from None
        tokens = call.tokens or []
        if len(tokens) > limit:
            raise too_long(call, limit, str(len(tokens)))
        assert model.tokenizer is not None
        if tokens and not 0 <= min(tokens) <= max(tokens) < model.tokenizer.vocab_size:
            raise InvalidParameter(
                f"Token ids are 0 to {model.tokenizer.vocab_size - 1} for this model; the prompt has one outside.", param="prompt"
            )
        return tokens


async def _bring(model: ServedModel, call: Call) -> None:
    """Have the model's words here. Raises `ModelNotLoaded`, `ModelTooLarge`, and `InvalidParameter`."""
    timeout = call.seconds_left()
    assert model.bring is not None
    try:
        async with asyncio.timeout(timeout):
            await model.bring()
    except TimeoutError:
        raise ModelNotLoaded(f"The model {model.public_name} could not be fetched within {timeout:g} s.", retry_after=5) from None
    # What was parsed before the vocabulary was known.
    named = [*call.sampling.stop_token_ids, *call.sampling.logit_bias]
    if named and model.tokenizer is not None and max(named) >= model.tokenizer.vocab_size:
        what = "stop_token_ids" if max(named) in call.sampling.stop_token_ids else "logit_bias"
        raise InvalidParameter(f"Token ids are 0 to {model.tokenizer.vocab_size - 1} for this model; `{what}` has one outside.", param=what)


def context_length(model: ServedModel) -> int:
    """Most tokens of prompt and completion together."""
    return model.card.context_length if model.card is not None else model.files.context_length


async def encode_text(model: ServedModel, text: str, *, limit: int | None = None) -> list[int]:
    """Plain text's token ids. Raises `TooManyTokens`."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    return await _aside(len(text), lambda: tokenizer.encode(text, limit=limit))


async def encode_messages(model: ServedModel, messages: tuple[Message, ...], *, limit: int | None = None) -> list[int]:
    """A conversation's token ids. Raises `TooManyTokens`, and `Unsupported` for a model without a chat template."""
    template = model.template
    if template is None:
        raise Unsupported(f"The model {model.public_name!r} has no chat template; use /v1/completions.", param="messages")
    size = sum(len(message.content) for message in messages) + 64 * len(messages)
    return await _aside(size, lambda: template.encode(messages, limit=limit))


async def _aside(size: int, encode: Callable[[], list[int]]) -> list[int]:
    if size <= INLINE_CHARACTERS:
        return encode()
    return await asyncio.to_thread(encode)


def fit(call: Call, prompt_tokens: int, limit: int) -> Sampling:
    """Cut `max_tokens` to what the context leaves. Raises `ContextLengthExceeded` where it leaves nothing."""
    sampling = call.sampling
    room = limit - prompt_tokens
    if room < min(1, sampling.max_tokens):
        raise too_long(call, limit, str(prompt_tokens))
    if sampling.max_tokens <= room:
        return sampling
    return msgspec.structs.replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))


def too_long(call: Call, limit: int, count: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"The context of this model is {limit} tokens, and the prompt has {count}. Shorten the prompt.",
        param="prompt" if call.messages is None else "messages",
    )


def refuse_unsupported(card: EngineCard, sampling: Sampling) -> None:
    """Raises `Unsupported`, naming the first field that the engine can't honour."""
    for word, asks in _NEEDS:
        if asks(sampling) and word not in card.capabilities:
            raise Unsupported(f"The engine of this model ({card.kind}) doesn't support `{word}`.", param=word)
