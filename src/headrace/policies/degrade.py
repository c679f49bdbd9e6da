"""Answers less while a model has too much to do: fewer tokens, or a smaller model's answer, and says so."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol, runtime_checkable

import msgspec

from headrace.call import Call
from headrace.config import ResilienceSection
from headrace.errors import ContextLengthExceeded, Unsupported
from headrace.policies.authorize import may_use
from headrace.ports import Step
from headrace.served import ServedModel, ServedModels

HEADER = "x-headrace-degraded"
FRESH = 0.1
"""Seconds that an engine's word on its queue is believed."""
PATIENCE = 0.1
"""Seconds to wait for that word."""


@runtime_checkable
class TellsQueue(Protocol):
    """The client of an engine that is elsewhere."""

    async def refresh(self, timeout: float = 1.0) -> object:
        """Fetch what `stats()` then says."""
        ...


class Degrade:
    """Changes `call.request` and, for another model, `call.served_model`. Comes after the cache: an answer at hand costs nothing.

    `prepare` makes the request anew for the smaller model, which has words of its own; where that model can't serve the request, or the
    caller's key isn't for it, the model that was asked for goes on. What a degraded call gets is not stored.
    """

    def __init__(self, models: ServedModels, section: ResilienceSection, prepare: Step) -> None:
        assert section.degrade_queue is not None
        self._models = models
        self._longest = section.degrade_queue
        self._max_tokens = section.degrade_max_tokens
        self._smaller = None if section.degrade_model is None else models.find(section.degrade_model)
        self._prepare = prepare
        self._asked_at: dict[str, float] = {}

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        if call.source is None:
            model = self._models.find(call.served_model)
            if await self._waiting(model) > self._longest:
                await self._degrade(call, model)
        yield

    async def _waiting(self, model: ServedModel) -> int:
        """Sequences in the engine's queue, over all API processes."""
        engine, now = model.engine, time.monotonic()
        if isinstance(engine, TellsQueue) and now - self._asked_at.get(model.files.name, 0.0) >= FRESH:
            self._asked_at[model.files.name] = now
            await engine.refresh(PATIENCE)
        return engine.stats().waiting

    async def _degrade(self, call: Call, model: ServedModel) -> None:
        said: list[str] = []
        smaller = self._smaller
        if smaller is not None and smaller is not model and await self._turn_to(call, smaller):
            said.append(f"model={smaller.public_name}")
        request = call.request
        assert request is not None, "the prepare step makes the request"
        most = self._max_tokens
        if most is not None and request.sampling.max_tokens > most:
            sampling = msgspec.structs.replace(request.sampling, max_tokens=most, min_tokens=min(request.sampling.min_tokens, most))
            call.request = msgspec.structs.replace(request, sampling=sampling)
            said.append(f"max_tokens={most}")
        if said:
            call.headers[HEADER] = ", ".join(said)
            call.storable = False

    async def _turn_to(self, call: Call, smaller: ServedModel) -> bool:
        """Whether the smaller model takes the request."""
        if not may_use(call.caller, smaller) or smaller.status.state != "ready" or names_token_ids(call):
            return False
        asked, request, served = call.model, call.request, call.served_model
        tokens = call.outcome.prompt_tokens
        call.model = smaller.files.name
        try:
            async with self._prepare(call):
                return True
        except (ContextLengthExceeded, Unsupported):
            call.request, call.served_model, call.outcome.prompt_tokens = request, served, tokens
            return False
        finally:
            call.model = asked


def names_token_ids(call: Call) -> bool:
    """Whether the request names tokens by their ids, which mean something else to another model."""
    return call.tokens is not None or bool(call.sampling.logit_bias) or bool(call.sampling.stop_token_ids)
