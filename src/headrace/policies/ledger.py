"""Every request has a row on the bill, which is durable before an engine is asked, and is settled when the request is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from headrace.call import Call
from headrace.errors import HeadraceError
from headrace.ports import Books
from headrace.records import UsageRow


class KeepBooks:
    """Opens a row, and closes it by `call.outcome`. Raises `StoreUnavailable` and `Overloaded`: what can't be billed doesn't run.

    An answer from the cache that costs nothing is noted when it is over; nobody waits for that.
    """

    def __init__(self, books: Books, currency: str) -> None:
        self._books = books
        self._currency = currency

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        row = UsageRow(
            id=call.id,
            opened_at=time.time(),
            tenant=call.subject_tenant,
            model=call.served_model or call.model or "",
            key="" if call.caller is None else call.caller.id,
            choices=call.sampling.n,
            currency=self._currency,
        )
        if call.source is None or call.outcome.cached_price:
            await self._books.open(row)
        try:
            yield
        finally:
            self._books.close(_closed(row, call), call.outcome.engine_request, more=call.outcome.others_go_on)


def _closed(row: UsageRow, call: Call) -> UsageRow:
    outcome = call.outcome
    report = outcome.report
    own = outcome.served_from == "engine"
    counted = not own or report is not None or outcome.billed_completion_tokens > 0
    return msgspec.structs.replace(
        row,
        # The model that really served, where a later step chose another one.
        model=call.served_model or row.model,
        finish=outcome.finish or "",
        status=_status(outcome.error, cached=outcome.served_from == "cache"),
        prompt_tokens=outcome.billed_prompt_tokens if counted else 0,
        cached_tokens=min(outcome.cached_tokens, outcome.billed_prompt_tokens) if counted and own else 0,
        completion_tokens=outcome.billed_completion_tokens if counted else 0,
        queue_ms=report.queue_ms if own and report is not None else 0.0,
        prefill_ms=report.prefill_ms if own and report is not None else 0.0,
        decode_ms=report.decode_ms if own and report is not None else 0.0,
    )


def _status(error: BaseException | None, *, cached: bool) -> str:
    if error is None:
        return "cached" if cached else "ok"
    if isinstance(error, HeadraceError):
        return error.code
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    return HeadraceError.code
