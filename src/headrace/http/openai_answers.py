"""What chat and plain completions share in their answers: the head of every object, usage, and the end of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from headrace.call import Call
from headrace.errors import HeadraceError
from headrace.http.collect import notes, timing
from headrace.http.openai_wire import usage
from headrace.http.problems import openai_error
from headrace.http.serving import Serving
from headrace.http.sse import DONE, comment, data_event
from headrace.types import TokenLogprob

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI says this instead."""


class Head:
    """The fields that begin each object of one answer.

    The model and its fingerprint are known only once the journey has chosen it, so they are read when first asked for.
    """

    __slots__ = ("_calls", "_id", "_made", "_object", "_serving")

    def __init__(self, serving: Serving, calls: Sequence[Call], prefix: str, kind: str) -> None:
        self._serving = serving
        self._calls = calls
        self._id = prefix + calls[0].id.removeprefix("req_")
        self._object = kind
        self._made: dict[str, Any] | None = None

    def fields(self) -> dict[str, Any]:
        if self._made is None:
            served = self._serving.served(self._calls[0])
            self._made = {
                "id": self._id,
                "object": self._object,
                "created": int(time.time()),
                "model": served.public_name,
                "system_fingerprint": served.card.fingerprint if served.card is not None else None,
            }
        return self._made

    def opening(self) -> bytes:
        """The beginning of a chunk's event, up to where its choices begin."""
        return b"data: " + msgspec.json.encode(self.fields())[:-1] + b',"choices":['


def usage_of(calls: Sequence[Call]) -> dict[str, Any]:
    """The sum over the calls of one request."""
    outcomes = [call.outcome for call in calls]
    return usage(
        sum(outcome.prompt_tokens for outcome in outcomes),
        sum(outcome.completion_tokens for outcome in outcomes),
        sum(outcome.cached_tokens for outcome in outcomes),
    )


def closing(head: Head, calls: Sequence[Call], *, include_usage: bool) -> bytes:
    """The end of a stream: usage where it was asked for, the timing, and the word that says it is over."""
    end = head.opening() + b'],"usage":' + msgspec.json.encode(usage_of(calls)) + b"}\n\n" if include_usage else b""
    said = timing(calls)
    return end + notes(calls) + (comment(said) if said else b"") + DONE


def error_event(error: HeadraceError) -> bytes:
    """The end of a stream that failed: clients raise it, and no [DONE] follows."""
    return data_event(msgspec.json.encode(openai_error(error)))


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB


def chat_logprobs(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            "token": entry.text,
            "logprob": finite(entry.logprob),
            "bytes": list(entry.raw),
            "top_logprobs": [{"token": text, "logprob": finite(logprob), "bytes": list(raw)} for _, logprob, text, raw in entry.top],
        }
        for entry in entries
    ]
