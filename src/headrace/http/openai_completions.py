"""`POST /v1/completions`: plain text or token ids go on, with `echo` and `logprobs` for scoring."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import msgspec
from starlette.requests import Request

from headrace.call import Call
from headrace.errors import InvalidParameter, Unsupported
from headrace.http.answers import Answer, json_answer
from headrace.http.body import read_body
from headrace.http.collect import collect, finish_for_clients, timing_headers
from headrace.http.exchange import Exchange, exchange_of
from headrace.http.hangup import Watch
from headrace.http.merge import merge, together
from headrace.http.openai_answers import Head, closing, error_event, finite, usage_of
from headrace.http.openai_nothing import COMPLETION, refuse_what_we_cannot
from headrace.http.openai_wire import CompletionRequest, default_tokens, parse, refuse_nul, sampling_of, vocabulary
from headrace.http.serving import Serving
from headrace.http.sse import json_text
from headrace.http.stream import Streamed, as_they_are, encoded
from headrace.served import ServedModel
from headrace.types import Delta, Event, FinishReason, PromptScores, Sampling, TokenLogprob

DEFAULT_MAX_TOKENS = 16

_decoder = msgspec.json.Decoder(CompletionRequest)


class Completions:
    def __init__(self, serving: Serving, body_limit: int) -> None:
        self._serving = serving
        self._body_limit = body_limit

    async def create(self, request: Request) -> Answer:
        """What comes after each prompt. Choice `i * n + j` is the j-th of prompt i; all prompts run side by side."""
        exchange = exchange_of(request.scope)
        asked = parse(_decoder, await read_body(exchange, request.receive, self._body_limit))
        refuse_what_we_cannot(asked, COMPLETION)
        served = self._serving.chosen(exchange, asked.model)
        prompts = prompts_of(asked.prompt, most=self._serving.config.server.max_batch, vocabulary=vocabulary(served))
        sampling = _sampling(asked, served)
        calls = [self._call(exchange, asked, sampling, prompt) for prompt in prompts]
        writers = [Continuations(self._serving, call, base=number * sampling.n, echo=bool(asked.echo)) for number, call in enumerate(calls)]
        journey = self._serving.journey
        if asked.stream:
            include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            head = Head(self._serving, calls, "cmpl-", "text_completion")
            chunks = [CompletionChunks(head, writer, usage=include_usage) for writer in writers]
            end = partial(closing, head, calls, include_usage=include_usage)
            pause = self._serving.config.server.keepalive_interval
            if len(calls) == 1:
                source, encode = journey.run(calls[0]), chunks[0].batch
                return Streamed(source, encode, closing=end, problem=error_event, keep_alive=pause, call=calls[0])
            sources = merge([encoded(journey, call, each) for call, each in zip(calls, chunks, strict=True)])
            return Streamed(sources, as_they_are, closing=end, problem=error_event, keep_alive=pause)
        async with Watch(request.receive, exchange.line):
            choices = await together([self._choices(call, writer) for call, writer in zip(calls, writers, strict=True)])
        fields = Head(self._serving, calls, "cmpl-", "text_completion").fields()
        fields["choices"] = [choice for group in choices for choice in group]
        fields["usage"] = usage_of(calls)
        return json_answer(fields, headers=timing_headers(calls))

    def _call(self, exchange: Exchange, asked: CompletionRequest, sampling: Sampling, prompt: str | list[int]) -> Call:
        text, tokens = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        streams = bool(asked.stream)
        return self._serving.call(exchange, sampling, model=asked.model, text=text, tokens=tokens, stream=streams, cache=asked.cache)

    async def _choices(self, call: Call, writer: Continuations) -> list[dict[str, Any]]:
        collected = await collect(self._serving.journey, call)
        made = []
        for index, choice in enumerate(collected.choices):
            prompt, prompt_scores = writer.echoed(index, collected.scores)
            if writer.blocked:
                made.append(writer.choice(index, prompt, prompt_scores, "content_filter"))
                continue
            scores = _join(prompt_scores, writer.scored(index, choice.logprobs))
            made.append(writer.choice(index, prompt + choice.text, scores, choice.finish))
        return made


def _sampling(asked: CompletionRequest, served: ServedModel) -> Sampling:
    n = 1 if asked.n is None else asked.n
    if asked.best_of is not None and asked.best_of != n:
        if asked.best_of < n:
            raise InvalidParameter("`best_of` is at least `n`.", param="best_of")
        raise Unsupported("`best_of`: this server makes as many choices as it returns; ask for more with `n`.", param="best_of")
    max_tokens = default_tokens(served, DEFAULT_MAX_TOKENS) if asked.max_tokens is None else asked.max_tokens
    prompt_logprobs = asked.logprobs if asked.echo else None
    if max_tokens == 0:
        if not asked.echo:
            raise InvalidParameter("`max_tokens` is at least 1, or 0 with `echo`.", param="max_tokens")
        # Something has to be asked of the engine: scores that are then not shown.
        prompt_logprobs = prompt_logprobs or 0
    return sampling_of(asked, served, max_tokens=max_tokens, logprobs=asked.logprobs, prompt_logprobs=prompt_logprobs)


def prompts_of(
    asked: str | list[str | int | list[int]], *, most: int, vocabulary: int | None
) -> list[str] | list[list[int]] | list[str | list[int]]:
    """The prompts, each text or token ids. Raises `InvalidParameter`."""
    prompts: list[str | list[int]]
    if isinstance(asked, str):
        prompts = [asked]
    else:
        kinds = set(map(type, asked))
        if kinds == {int}:
            prompts = [cast(list[int], asked)]
        elif int in kinds:
            raise InvalidParameter("`prompt` mixes token ids with other things.", param="prompt")
        elif len(asked) > most:
            raise InvalidParameter(f"`prompt` has {len(asked)} prompts; this server takes at most {most} (max_batch).", param="prompt")
        else:
            prompts = [prompt for prompt in asked if not isinstance(prompt, int)]
    for number, prompt in enumerate(prompts):
        name = "prompt" if len(prompts) == 1 else f"prompt[{number}]"
        if not prompt:
            raise InvalidParameter(f"`{name}` is empty.", param=name)
        if isinstance(prompt, str):
            refuse_nul(prompt, (name,))
        elif vocabulary is not None and max(prompt) >= vocabulary:
            raise InvalidParameter(f"Token ids are 0 to {vocabulary - 1} for this model; `{name}` has {max(prompt)}.", param=name)
    return prompts


Scores = dict[str, list[Any]]
"""The legacy form of logprobs: parallel lists."""


def _join(one: Scores | None, other: Scores | None) -> Scores | None:
    if one is None or other is None:
        return one or other
    return {name: one[name] + other[name] for name in one}


class Continuations:
    """One call's choices in OpenAI's legacy form. `text_offset` counts characters from where the choice's text begins."""

    __slots__ = ("_base", "_decoders", "_echo", "_offsets", "_serving", "_shown", "blocked", "call")

    def __init__(self, serving: Serving, call: Call, *, base: int, echo: bool) -> None:
        self._serving = serving
        self.call = call
        self._base = base
        self._echo = echo
        self._shown: tuple[str, Sequence[TokenLogprob | None], bytes] | None = None
        self.blocked = False
        """The prompt has what the output filter ends answers for."""
        n = call.sampling.n
        self._offsets = [0] * n
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(n)]

    @property
    def echoes(self) -> bool:
        return self._echo

    @property
    def waits_for_scores(self) -> bool:
        return self._echo and self.call.sampling.prompt_logprobs is not None

    def choice(self, index: int, text: str, scores: Scores | None, finish: FinishReason | None) -> dict[str, Any]:
        return {"index": self._base + index, "text": text, "logprobs": scores, "finish_reason": finish}

    def echoed(self, index: int, scores: Sequence[TokenLogprob | None]) -> tuple[str, Scores | None]:
        """The prompt's text and scores, where they were asked for, as far as the output filter lets them pass."""
        if not self._echo:
            return "", None
        if self._shown is None:
            self._shown = self._prompt(scores)
        text, entries, first_bytes = self._shown
        if self.call.sampling.logprobs is None or not scores:
            self._offsets[index] = len(text)
            return text, None
        return text, self._legacy(index, entries, first_bytes)

    def _prompt(self, scores: Sequence[TokenLogprob | None]) -> tuple[str, Sequence[TokenLogprob | None], bytes]:
        """Its text, its scores, and the bytes of its first token, which has none."""
        call = self.call
        text = call.text
        tokenizer = self._serving.served(call).tokenizer
        if text is None:
            assert tokenizer is not None, "the journey refuses token ids where there is no tokenizer"
            text = tokenizer.decode(call.tokens or [])
        tokens: list[int] = [] if call.request is None else call.request.prompt
        skip = 0
        if call.text is not None and tokenizer is not None:
            # A beginning-of-text token in front of the prompt is no part of the text that is echoed.
            bos = tokenizer.bos_ids
            skip = len(bos) if bos and tuple(tokens[: len(bos)]) == tuple(bos) else 0
        entries = list(scores[skip:])
        first_bytes = b""
        if entries and entries[0] is None and tokenizer is not None and len(tokens) > skip:
            first_bytes = tokenizer.token_bytes(tokens[skip])
        if call.repeats is None:
            return text, entries, first_bytes
        unscored = TokenLogprob(-1, 0.0, "", first_bytes)
        text, shown, self.blocked = call.repeats(call, text, [unscored if entry is None else entry for entry in entries])
        kept: list[TokenLogprob | None] = [*shown]
        if kept and entries[0] is None:
            first_bytes, kept[0] = shown[0].raw, None
        return text, kept, first_bytes

    def scored(self, index: int, entries: Sequence[TokenLogprob]) -> Scores | None:
        """A completion's scores, where they were asked for."""
        return None if self.call.sampling.logprobs is None else self._legacy(index, entries, b"")

    def _legacy(self, index: int, entries: Sequence[TokenLogprob | None], unscored: bytes) -> Scores:
        tokens: list[str] = []
        logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            raw = unscored if entry is None else entry.raw
            name = token_name(raw)
            tokens.append(name)
            offsets.append(self._offsets[index])
            self._offsets[index] += len(self._decoders[index].decode(raw))
            if entry is None:
                logprobs.append(None)
                tops.append(None)
            else:
                top = {token_name(each): finite(logprob) for _, logprob, _, each in reversed(entry.top)}
                # The chosen token is always told, even if it isn't among the likeliest.
                top.setdefault(name, finite(entry.logprob))
                logprobs.append(finite(entry.logprob))
                tops.append(dict(sorted(top.items(), key=lambda item: -item[1])))
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def token_name(raw: bytes) -> str:
    """A token's text, or OpenAI's `bytes:\\xe2\\x80` where it is no whole text."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class CompletionChunks:
    """Events as chunks of a stream. One choice's tokens in a batch are one chunk, and so is its end."""

    __slots__ = ("_echo_due", "_head", "_opening", "_texts", "_usage", "_writer")

    def __init__(self, head: Head, writer: Continuations, *, usage: bool) -> None:
        self._head = head
        self._writer = writer
        self._usage = usage
        self._opening = b""
        self._echo_due = writer.echoes

    def batch(self, events: list[Event]) -> bytes:
        if not self._opening:
            self._opening = self._head.opening()
        out = b""
        for event in events:
            if isinstance(event, PromptScores):
                out += self._echo(event.scores)
            elif isinstance(event, Delta):
                if self._echo_due:
                    out += self._echo(())
                out += self._chunk(event)
        return out

    def _echo(self, scores: Sequence[TokenLogprob | None]) -> bytes:
        self._echo_due = False
        out = b""
        for index in range(self._writer.call.sampling.n):
            text, legacy = self._writer.echoed(index, scores)
            finish: FinishReason | None = "content_filter" if self._writer.blocked else None
            out += self._event(self._writer.choice(index, text, legacy, finish))
        return out

    def _chunk(self, delta: Delta) -> bytes:
        if self._writer.blocked or not (delta.text or delta.logprobs or delta.finish):
            return b""
        scores = self._writer.scored(delta.choice, delta.logprobs) if delta.logprobs else None
        finish = None if delta.finish is None else finish_for_clients(delta.finish)
        return self._event(self._writer.choice(delta.choice, delta.text, scores, finish))

    def _event(self, choice: dict[str, Any]) -> bytes:
        text = json_text(choice["text"])
        rest = msgspec.json.encode({"logprobs": choice["logprobs"], "finish_reason": choice["finish_reason"]})
        tail = b'],"usage":null}\n\n' if self._usage else b"]}\n\n"
        return self._opening + b'{"index":%d,"text":' % choice["index"] + text + b"," + rest[1:] + tail
