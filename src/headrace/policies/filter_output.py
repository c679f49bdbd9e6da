"""Masks or blocks denied words and personal data in answers, in every choice and in log-probabilities."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from headrace.call import Call
from headrace.policies.filters.decisions import Decisions
from headrace.policies.filters.logprob_mask import LogprobMask
from headrace.policies.filters.stream import Rules, Stream
from headrace.types import Delta, Event, TokenLogprob


class FilterOutput:
    """Adds a transform to the call. Tokens pass when they come, for they are billed; text and log-probabilities may be held back."""

    def __init__(self, rules: Rules, *, report: bool = False) -> None:
        self._rules = rules
        self._report = report

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        call.transforms.append(self.transform(call))
        call.repeats = self._repeated
        yield

    def _repeated(self, call: Call, text: str, tokens: Sequence[TokenLogprob]) -> tuple[str, Sequence[TokenLogprob], bool]:
        """`types.Repeats`. A text of its own: a match that begins in the prompt and ends in what comes after it isn't one."""
        stream = Stream(self._rules, Decisions(call, "output", report=self._report))
        mask = LogprobMask(stream, self._rules.mask)
        shown, released = mask.feed(text, tokens)
        if not stream.blocked:
            rest, further = mask.finish()
            shown, released = shown + rest, released + further
        return shown, released, stream.blocked

    def transform(self, call: Call) -> OutputTransform:
        return OutputTransform(call, self._rules, Decisions(call, "output", report=self._report))


class OutputTransform:
    """Filters one call's event batches. Sets `call.ended` when no choice has anything more to say because of a block."""

    def __init__(self, call: Call, rules: Rules, decisions: Decisions) -> None:
        self._call = call
        self._rules = rules
        self._decisions = decisions
        self._streams: dict[int, Stream] = {}
        self._masks: dict[int, LogprobMask] = {}
        self._over: set[int] = set()
        self._blocked = False
        self._with_logprobs = call.sampling.logprobs is not None

    def __call__(self, batch: list[Event]) -> list[Event]:
        if self._call.outcome.served_from == "cache":
            # The cache keeps what left this filter.
            return batch
        out: list[Event] = []
        for event in batch:
            if not isinstance(event, Delta):
                out.append(event)
            elif event.choice not in self._over:
                out.append(self._filtered(event))
        return out

    def _filtered(self, delta: Delta) -> Delta:
        stream = self._streams.get(delta.choice)
        if stream is None:
            stream = self._streams[delta.choice] = Stream(self._rules, self._decisions)
        logprobs = delta.logprobs
        if self._with_logprobs:
            text, logprobs = self._scored(delta, stream)
        else:
            text = stream.feed(delta.text) if delta.text else ""
            if delta.finish is not None and not stream.blocked:
                text += stream.finish()
        finish, stop_reason = delta.finish, delta.stop_reason
        if stream.blocked:
            finish, stop_reason = "content_filter", None
            self._end(delta.choice, blocked=True)
        elif finish is not None:
            self._end(delta.choice, blocked=False)
        elif text == delta.text and logprobs is delta.logprobs:
            return delta
        return Delta(delta.choice, delta.index, delta.tokens, text, finish, stop_reason, logprobs)

    def _scored(self, delta: Delta, stream: Stream) -> tuple[str, tuple[TokenLogprob, ...]]:
        mask = self._masks.get(delta.choice)
        if mask is None:
            mask = self._masks[delta.choice] = LogprobMask(stream, self._rules.mask)
        text, logprobs = mask.feed(delta.text, delta.logprobs)
        if delta.finish is not None and not stream.blocked:
            rest, further = mask.finish()
            text, logprobs = text + rest, logprobs + further
        return text, logprobs

    def _end(self, choice: int, *, blocked: bool) -> None:
        self._over.add(choice)
        del self._streams[choice]
        self._masks.pop(choice, None)
        self._blocked = self._blocked or blocked
        if self._blocked and len(self._over) >= self._call.sampling.n:
            self._call.ended = True
