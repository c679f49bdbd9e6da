"""A call run to its end, for answers that are not streamed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from headrace.call import Call
from headrace.errors import RequestFailed
from headrace.http.serving import Runs
from headrace.http.sse import comment
from headrace.types import Delta, Event, FinishReason, PromptScores, TokenLogprob


@dataclass(slots=True)
class Choice:
    pieces: list[str] = field(default_factory=list)
    finish: FinishReason = "stop"
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(slots=True)
class Collected:
    """`call.Sink`."""

    choices: list[Choice]
    scores: tuple[TokenLogprob | None, ...] = ()

    def ready(self) -> bool:
        return True

    def put(self, batch: list[Event]) -> None:
        for event in batch:
            if type(event) is Delta:
                choice = self.choices[event.choice]
                if event.text:
                    choice.pieces.append(event.text)
                if event.logprobs:
                    choice.logprobs.extend(event.logprobs)
                if event.finish is not None:
                    choice.finish = finish_for_clients(event.finish)
            elif type(event) is PromptScores:
                self.scores = event.scores


async def collect(journey: Runs, call: Call) -> Collected:
    """All that a call gave. Raises the journey's errors."""
    collected = call.sink = Collected([Choice() for _ in range(call.sampling.n)])
    try:
        async with aclosing(journey.run(call)) as batches:
            async for batch in batches:
                collected.put(batch)
    finally:
        call.sink = None
    return collected


def finish_for_clients(finish: FinishReason) -> FinishReason:
    """Raises `RequestFailed` for the reasons that are none of a client's."""
    if finish in ("cancelled", "error"):
        raise RequestFailed("The engine ended the request before it was complete.")
    return finish


def timing(calls: Iterable[Call]) -> str:
    """Milliseconds of the slowest call in each phase, in the form of a Server-Timing header."""
    reports = [call.outcome.report for call in calls if call.outcome.report is not None]
    if not reports:
        return ""
    queue = max(report.queue_ms for report in reports)
    prefill = max(report.prefill_ms for report in reports)
    decode = max(report.decode_ms for report in reports)
    return f"queue;dur={queue:.1f}, prefill;dur={prefill:.1f}, decode;dur={decode:.1f}"


def notes(calls: Iterable[Call]) -> bytes:
    """What callers are told of the journey, as comments at the end of a stream."""
    return b"".join(comment(f"{name}: {value}") for call in calls for name, value in call.notes.items())


def timing_headers(calls: Iterable[Call]) -> list[tuple[bytes, bytes]]:
    said = timing(calls)
    return [(b"server-timing", said.encode())] if said else []
