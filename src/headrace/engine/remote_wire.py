"""OpenAI's wire format from the client's side: what we ask an upstream server, and what it answers."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from headrace.errors import BadRequest, ContextLengthExceeded, HeadraceError, ModelNotFound, Overloaded, RateLimited, UpstreamError
from headrace.types import Delta, Event, FinishReason, GenerateRequest, Message, Report, Sampling

UNLIMITED = 1_000_000
"""A `max_tokens` from here on means «as many as fit», which upstream servers express by leaving it out."""
PSEUDO_TOKEN = -1
"""Stands for a piece of text whose token ids are unknown; one for each piece, until the usage corrects the count."""
MAX_EVENT = 16 * 1024 * 1024
"""Bytes of one server-sent event."""

_DEFAULTS = Sampling(max_tokens=1)
_PASSED = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
_PASSED_IF_SET = ("top_k", "min_p", "repetition_penalty", "seed", "min_tokens", "ignore_eos", "n")
"""Not every upstream knows these, so they are only sent where they ask for something."""


def body_of(request: GenerateRequest, model: str, *, stream: bool, usage: bool) -> dict[str, Any]:
    """The JSON body that asks the upstream for this. `usage`: also ask for the token counts of a stream."""
    sampling = request.sampling
    body: dict[str, Any] = {"model": model, "stream": stream}
    if request.text is not None:
        body["prompt"] = request.text
    else:
        body["messages"] = [_message(message) for message in request.messages]
    if sampling.max_tokens < UNLIMITED:
        body["max_tokens"] = sampling.max_tokens
    for name in _PASSED:
        body[name] = getattr(sampling, name)
    for name in _PASSED_IF_SET:
        if getattr(sampling, name) != getattr(_DEFAULTS, name):
            body[name] = getattr(sampling, name)
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        body["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if stream and usage:
        body["stream_options"] = {"include_usage": True}
    return body


def _message(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = msgspec.to_builtins(message)
    made["content"] = message.content
    return made


class EventLines:
    """Server-sent events from bytes cut anywhere: the data of each, with LF, CR LF or CR at line ends."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of the events that `piece` completes. Raises `UpstreamError` for one without end."""
        text = self._rest + piece
        # A carriage return at the end may be half of CR LF.
        held = text[-1:] if text.endswith(b"\r") else b""
        *lines, rest = re.split(rb"\r\n|\n|\r", text[: len(text) - len(held)])
        self._rest = rest + held
        for line in lines:
            yield from self._line(line)
        if self._size + len(self._rest) > MAX_EVENT:
            raise UpstreamError("The upstream server sent an event without end.")

    def finish(self) -> Iterator[bytes]:
        """The last event, where the stream ended without the empty line after it."""
        for line in re.split(rb"\r\n|\n|\r", self._rest):
            yield from self._line(line)
        self._rest = b""
        yield from self._line(b"")

    def _line(self, line: bytes) -> Iterator[bytes]:
        if not line:
            if self._data:
                yield b"\n".join(self._data)
            self._data, self._size = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._data.append(value[1:] if value.startswith(b" ") else value)
            self._size += len(value)


class Answer:
    """An answer as it comes, in chunks or whole: turns what the upstream says into events, and counts."""

    def __init__(self, choices: int) -> None:
        self.done = False
        """The upstream said that it was the end."""
        self._open = set(range(choices))
        self._index = [0] * choices
        self._usage: Mapping[str, Any] = {}

    @property
    def complete(self) -> bool:
        """Every choice has ended."""
        return not self._open

    def chunk(self, data: bytes) -> list[Event]:
        """What one event of a stream means. Raises `UpstreamError` for an error in it, or where it makes no sense."""
        if data.strip() == b"[DONE]":
            self.done = True
            return []
        return self.read(data, part="delta")

    def read(self, data: bytes, *, part: str) -> list[Event]:
        """Events of a JSON object with `choices`; `part` is `delta` in a stream and `message` otherwise."""
        try:
            said = json.loads(data)
        except (ValueError, RecursionError):
            raise UpstreamError("The upstream server sent something that is not JSON.") from None
        if not isinstance(said, dict):
            raise UpstreamError("The upstream server's answer makes no sense.")
        if said.get("error"):
            raise UpstreamError(f"The upstream server failed: {error_message(said) or 'it did not say why'}")
        if isinstance(said.get("usage"), dict):
            self._usage = said["usage"]
        choices = said.get("choices") or []
        if not isinstance(choices, list):
            raise UpstreamError("The upstream server's answer makes no sense.")
        return [delta for choice in choices if (delta := self._delta(choice, part)) is not None]

    def _delta(self, choice: Any, part: str) -> Delta | None:
        if not isinstance(choice, dict):
            raise UpstreamError("The upstream server's answer makes no sense.")
        number = choice.get("index", 0)
        if type(number) is not int or not 0 <= number < len(self._index):
            raise UpstreamError("The upstream server answered with a choice that was not asked for.")
        inner = choice.get(part)
        text = inner.get("content") if isinstance(inner, dict) else choice.get("text")
        finish = _finish(choice.get("finish_reason"))
        if number not in self._open or (not text and finish is None):
            return None
        if text is not None and not isinstance(text, str):
            raise UpstreamError("The upstream server's answer makes no sense.")
        tokens = (PSEUDO_TOKEN,) if text else ()
        if finish is not None:
            self._open.discard(number)
        reason = choice.get("stop_reason")
        delta = Delta(number, self._index[number], tokens, text or "", finish, reason if isinstance(reason, str | int) else None)
        self._index[number] += len(tokens)
        return delta

    def report(self, *, queue_ms: float, prefill_ms: float, decode_ms: float) -> Report:
        """Counts from the upstream's usage; without one, a completion token for each piece and no prompt tokens."""
        details = self._usage.get("prompt_tokens_details")
        return Report(
            prompt_tokens=_count(self._usage.get("prompt_tokens"), 0),
            cached_tokens=_count(details.get("cached_tokens"), 0) if isinstance(details, dict) else 0,
            completion_tokens=_count(self._usage.get("completion_tokens"), sum(self._index)),
            queue_ms=queue_ms,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
        )


def _finish(reason: Any) -> FinishReason | None:
    if reason is None or reason == "":
        return None
    return "length" if reason == "length" else "stop"


def _count(value: Any, default: int) -> int:
    return value if type(value) is int and value >= 0 else default


def refusal(status: int, body: bytes, headers: Mapping[str, str]) -> HeadraceError:
    """The error that a refusing answer means for our client. What it says of the server's own key is kept to ourselves."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    said = error_message(answer)
    told = f": {said}" if said else "."
    if status in (401, 403):
        return UpstreamError("The upstream server refused this server's key; set HEADRACE_REMOTE_API_KEY.")
    if status == 404:
        return ModelNotFound(f"The upstream server doesn't know the model or the route{told}")
    if status == 429:
        return RateLimited(f"The upstream server is limiting requests{told}", retry_after=retry_after(headers))
    if status == 503:
        return Overloaded(f"The upstream server is not available{told}", retry_after=retry_after(headers))
    if 400 <= status < 500:
        kind = ContextLengthExceeded if _code(answer) == ContextLengthExceeded.code else BadRequest
        return kind(said or f"The upstream server refused the request with status {status}.")
    return UpstreamError(f"The upstream server failed with status {status}{told}", retry_after=retry_after(headers))


def error_message(said: Any) -> str:
    """The message in an error body of OpenAI's or FastAPI's shape; empty if there is none."""
    if not isinstance(said, dict):
        return ""
    error = said.get("error", said)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail")
    return error[:1000] if isinstance(error, str) else ""


def _code(said: Any) -> Any:
    if not isinstance(said, dict):
        return None
    error = said.get("error", said)
    return error.get("code") if isinstance(error, dict) else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds from a `Retry-After` header, which holds seconds or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, min(float(value), 86400.0))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
