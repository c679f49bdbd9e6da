"""Counts what alerts want to know of requests: how many failed by the server's fault, and how many waited long in an engine's queue."""

from __future__ import annotations

from collections.abc import Sequence

from headrace.call import Call
from headrace.errors import DeadlineExceeded, DeadlineUnmeetable, HeadraceError
from headrace.http.exchange import Exchange
from headrace.http.failures import Failure, model_name
from headrace.policies.alert_rules import RequestCounts
from headrace.served import ServedModels


class RequestTally:
    """`queue_seconds`: what is a long wait. Every item of a batch is a request. Those that are refused by their caller's fault (4xx) are
    not counted at all: else a flood of them would hide what fails."""

    def __init__(self, models: ServedModels, queue_seconds: float) -> None:
        self._models = models
        self._queue_seconds = queue_seconds
        self._counts: dict[str, RequestCounts] = {}

    def note(self, exchange: Exchange, failed: Sequence[Failure], now: float) -> None:
        """A request is over. `failed` as in `http.failures`."""
        if not exchange.calls:
            if failed and _our_fault(None, failed[0][1]):
                counts = self._of("")
                counts.requests += 1
                counts.failed += 1
            return
        errors = {id(call): error for call, error in failed}
        for call in exchange.calls:
            error = errors.get(id(call))
            if error is not None and not _our_fault(call, error):
                continue
            counts = self._of(model_name(self._models, call))
            counts.requests += 1
            if error is not None:
                counts.failed += 1
            first = call.outcome.first_token_at
            if first is not None and call.outcome.served_from == "engine":
                counts.begun += 1
                counts.first_seconds += first - call.started_at
            waited = self._waited(call, now)
            if waited is not None:
                counts.queued += 1
                if waited > self._queue_seconds:
                    counts.waited += 1

    def taken(self) -> list[RequestCounts]:
        """What has come together since the last time."""
        counts = list(self._counts.values())
        self._counts = {}
        return counts

    def _of(self, model: str) -> RequestCounts:
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = RequestCounts(model)
        return counts

    def _waited(self, call: Call, now: float) -> float | None:
        """Seconds in the engine's queue, where they are known."""
        outcome = call.outcome
        if call.request is None or outcome.served_from != "engine":
            return None
        if outcome.report is not None:
            return outcome.report.queue_ms / 1000
        # It ended while it waited; nobody knows in which queue, but longer than that it wasn't.
        waited = now - call.started_at
        return waited if outcome.first_token_at is None and waited > self._queue_seconds else None


def _our_fault(call: Call | None, error: Exception) -> bool:
    if isinstance(error, DeadlineUnmeetable) or (isinstance(error, DeadlineExceeded) and call is not None and call.timeout is not None):
        return False  # the deadline is the client's
    return not isinstance(error, HeadraceError) or error.status >= 500
