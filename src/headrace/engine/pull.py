"""`generate` for an engine that pushes: its deliveries as an async iterator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from headrace.errors import HeadraceError
from headrace.ports import Submits
from headrace.types import Event, GenerateRequest, Report


async def pull(engine: Submits, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
    """Submit, and yield what is delivered; events that came while nobody asked come in one batch.

    Closing the generator cancels the request. Raises the error that was delivered, or that `submit` raised.
    """
    pending: list[Event] = []
    failure: HeadraceError | None = None
    waiter: asyncio.Future[None] | None = None
    ended = False

    def deliver(what: Sequence[Event] | HeadraceError) -> None:
        nonlocal failure, ended
        if isinstance(what, HeadraceError):
            failure, ended = what, True
        else:
            pending.extend(what)
            ended = isinstance(what[-1], Report)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    engine.submit(request, deliver)
    try:
        while pending or not ended:
            if not pending:
                waiter = asyncio.get_running_loop().create_future()
                await waiter
                waiter = None
            batch = pending[:]
            pending.clear()
            if batch:
                yield batch
        if failure is not None:
            raise failure
    finally:
        if not ended:
            engine.cancel(request.id)
