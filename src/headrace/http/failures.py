"""What went wrong with a request: for the counters, and for error tracking, which is told what an operator has to know of."""

from __future__ import annotations

from headrace.call import Call
from headrace.error_tracking import ErrorTracker, steady, tracked
from headrace.errors import (
    CircuitOpen,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    ModelNotFound,
    Overloaded,
    StoreUnavailable,
)
from headrace.http.exchange import Exchange
from headrace.served import ServedModels

Failure = tuple[Call | None, Exception]

_OUR_WORDS = (EngineDied, EngineUnavailable, CircuitOpen, StoreUnavailable, DeadlineExceeded)
"""Errors whose messages never repeat what somebody else wrote."""


def failures(exchange: Exchange) -> list[Failure]:
    """The errors that a request ended with, one for each call (an item of a batch), and one of its own where no call had it.

    A client that hung up is no error.
    """
    found: list[Failure] = [(call, error) for call in exchange.calls if isinstance(error := call.outcome.error, Exception)]
    own = exchange.error
    if own is not None and all(error is not own for _, error in found):
        found.append((exchange.calls[-1] if exchange.calls else None, own))
    return found


def code_of(error: Exception) -> str:
    return error.code if isinstance(error, HeadraceError) else HeadraceError.code


def model_name(models: ServedModels, call: Call | None) -> str:
    """The public name of the call's model; empty where there is none of that name, which a client may have made up."""
    if call is None:
        return ""
    try:
        return models.find(call.served_model or call.model).public_name
    except ModelNotFound:
        return ""


def is_trouble(call: Call | None, error: Exception) -> bool:
    """Whether an operator has to know: not of refusals, of a server that has enough to do or stops, or of a deadline that a client set."""
    if not isinstance(error, HeadraceError):
        return True
    if isinstance(error, DeadlineExceeded) and call is not None and call.timeout is not None:
        return False
    if isinstance(error, EngineUnavailable) and error.leaving:
        return False
    return error.status >= 500 and not isinstance(error, Overloaded)


def track(tracker: ErrorTracker, models: ServedModels, exchange: Exchange, failed: list[Failure]) -> None:
    """Tell error tracking."""
    for call, error in failed:
        if is_trouble(call, error):
            tracker.note(
                tracked(
                    tracker.process,
                    code_of(error),
                    error,
                    route=exchange.route,
                    model=model_name(models, call),
                    detail=steady(str(error)) if isinstance(error, _OUR_WORDS) else "",
                    request_id=exchange.id,
                )
            )
