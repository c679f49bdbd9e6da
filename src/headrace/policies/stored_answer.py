"""An answer as it is kept: the events that left the output filters, as bytes and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from headrace.call import Call
from headrace.types import Delta, Event, PromptScores, Report

PIECE = 32
"""Tokens of a choice that one stored delta holds, at least: so many are in a chunk when an answer is streamed again."""


class StoredAnswer(msgspec.Struct, frozen=True, array_like=True):
    prompt_tokens: int
    completion_tokens: int
    events: tuple[Delta | PromptScores, ...]
    notes: dict[str, str]
    """What callers are told of the journey (`Call.notes`)."""

    def again(self) -> list[Event]:
        """All of the answer. Its report says that all of the prompt was cached, and nothing took any time."""
        return [*self.events, Report(self.prompt_tokens, self.prompt_tokens, self.completion_tokens, 0.0, 0.0, 0.0)]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StoredAnswer).decode


def pack(answer: StoredAnswer) -> bytes:
    """Raises `UnicodeEncodeError` for text with half a surrogate pair."""
    return _encode(answer)


def unpack(stored: bytes) -> StoredAnswer | None:
    """None for what is damaged, or of another form."""
    try:
        return _decode(stored)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


class Recorder:
    """Writes down what leaves, as a tap of a call, and says in the end whether that is worth keeping."""

    __slots__ = ("_events",)

    def __init__(self) -> None:
        self._events: list[Event] = []

    def __call__(self, batch: list[Event]) -> None:
        self._events += batch

    def answer(self, call: Call, notes: Mapping[str, str]) -> StoredAnswer | None:
        """None unless every choice came to its natural end and the report closed it."""
        if call.outcome.error is not None or call.ended or not self._events or not isinstance(self._events[-1], Report):
            return None
        ends = {event.choice: event.finish for event in self._events if isinstance(event, Delta) and event.finish is not None}
        if len(ends) != call.sampling.n or not set(ends.values()) <= {"stop", "length"}:
            return None
        report = self._events[-1]
        return StoredAnswer(report.prompt_tokens, report.completion_tokens, tuple(joined(self._events)), dict(notes))


def joined(events: Iterable[Event]) -> list[Delta | PromptScores]:
    """Each choice's neighbouring deltas as one, of `PIECE` tokens or more; the order of a choice's own events stays."""
    out: list[Delta | PromptScores] = []
    gathered: dict[int, list[Delta]] = {}
    counts: dict[int, int] = {}

    def flush(choice: int) -> None:
        deltas = gathered.pop(choice)
        counts[choice] = 0
        last = deltas[-1]
        if len(deltas) == 1:
            out.append(last)
            return
        out.append(
            Delta(
                choice,
                deltas[0].index,
                tuple(token for delta in deltas for token in delta.tokens),
                "".join(delta.text for delta in deltas),
                last.finish,
                last.stop_reason,
                tuple(logprob for delta in deltas for logprob in delta.logprobs),
            )
        )

    for event in events:
        if isinstance(event, PromptScores):
            out.append(event)
        elif isinstance(event, Delta):
            choice = event.choice
            gathered.setdefault(choice, []).append(event)
            counts[choice] = counts.get(choice, 0) + len(event.tokens)
            if event.finish is not None or counts[choice] >= PIECE:
                flush(choice)
    for choice in [*gathered]:
        flush(choice)
    return out
