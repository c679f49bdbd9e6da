"""Asks the engine: through its circuit breaker, and again where it fails before the first token and the retry budget allows it."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec

from headrace.call import Call, Outcome
from headrace.config import ResilienceSection
from headrace.errors import DeadlineExceeded, EngineDied, EngineUnavailable, HeadraceError, NotAdmitted, Overloaded, UpstreamError
from headrace.policies.circuit import Circuit
from headrace.policies.relay import Relay
from headrace.policies.retry import RetryBudget, may_help, pause
from headrace.served import ServedModel, ServedModels
from headrace.types import Event, GenerateRequest

MODEL_HEADER = "x-headrace-model"
FALLBACK_HEADER = "x-headrace-fallback"


class AskEngine:
    """Sets `call.source`, unless the call has one already; the last step of all. `circuits` by model; none where breakers are off.

    Reading the source raises what the engine raises, and `CircuitOpen`.
    """

    def __init__(
        self,
        models: ServedModels,
        section: ResilienceSection,
        circuits: Mapping[str, Circuit] | None = None,
        *,
        draw: random.Random | None = None,
    ) -> None:
        self._models = models
        self._circuits = circuits or {}
        self._budgets = {model.files.name: RetryBudget(section.retry_budget, section.retry_reserve) for model in models}
        self.retries = section.retry_attempts if section.retry_budget else 0
        self.slow = section.breaker_slow_ttft or float("inf")
        self.draw = draw or random.Random()

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        model = self._models.find(call.served_model)
        call.headers[MODEL_HEADER] = model.public_name
        if call.source is not None:
            yield
            return
        assert call.request is not None, "the prepare step makes the request"
        name = model.files.name
        asking = call.source = Asking(self, model, self._circuits.get(name), self._budgets[name], call)
        try:
            yield
        finally:
            # They know each other: left as they are, only the garbage collector would find them.
            call.source = None
            asking.settle(call.outcome)
            if asking.retries:
                call.retried += (name,) * asking.retries


class Asking(Relay):
    """The engine's event batches for one call. Asked when it is first read; after the first batch each read is the engine's own."""

    __slots__ = (
        "_asker",
        "_budget",
        "_call",
        "_circuit",
        "_client_deadline",
        "_epoch",
        "_first_token",
        "_impatient",
        "_model",
        "_request",
        "retries",
    )

    def __init__(self, asker: AskEngine, model: ServedModel, circuit: Circuit | None, budget: RetryBudget, call: Call) -> None:
        assert call.request is not None
        self._asker = asker
        self._model = model
        self._circuit = circuit
        self._budget = budget
        self._call = call
        self._request: GenerateRequest = call.request
        self._client_deadline = call.timeout is not None or FALLBACK_HEADER in call.headers
        self._impatient = call.others_left
        self._epoch = 0
        self._first_token = 0.0
        """Seconds to the first batch; 0 until it is there."""
        self.retries = 0
        """Times that the engine was asked again."""
        self._source = None
        self._next = self._first

    async def aclose(self) -> None:
        """Hang up. Idempotent."""
        source, self._source = self._source, None
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()

    def settle(self, outcome: Outcome) -> None:
        """Tell the breaker what only the end could show: that it failed under way, or that it was slow and not for waiting its turn."""
        circuit = self._circuit
        if circuit is None or not self._first_token:
            return
        if isinstance(outcome.error, HeadraceError) and self._counts(outcome.error):
            circuit.note(self._epoch, failed=True, death=isinstance(outcome.error, EngineDied))
        elif self._first_token >= self._asker.slow and outcome.report is not None:
            circuit.note(self._epoch, failed=self._first_token - outcome.report.queue_ms / 1000 >= self._asker.slow)

    async def _first(self) -> list[Event]:
        """The first batch, at the first attempt or at a later one."""
        began = time.monotonic()
        request = self._request
        if request.timeout is not None and (now_left := self._call.seconds_left()) is not None and now_left != request.timeout:
            # The steps since it was prepared may have waited.
            request = self._request = msgspec.structs.replace(request, timeout=now_left)
        timeout = request.timeout
        self._budget.earn()
        while True:
            try:
                return await self._attempt(request)
            except HeadraceError as error:
                await self.aclose()
                if self.retries >= self._asker.retries or not may_help(error) or self._model.status.state != "ready":
                    raise
                seconds = pause(self.retries, error.retry_after, self._asker.draw)
                left = None if timeout is None else timeout - (time.monotonic() - began)
                if seconds is None or (left is not None and seconds >= left) or not self._budget.spend():
                    raise
            self.retries += 1
            await asyncio.sleep(seconds)
            if left is not None:
                request = msgspec.structs.replace(self._request, timeout=max(0.001, left - seconds))

    async def _attempt(self, request: GenerateRequest) -> list[Event]:
        circuit, status = self._circuit, self._model.status
        # A model that isn't loaded yet is waited for: else it never would be, where it has fallbacks.
        if self._impatient and status.state not in ("ready", "absent", "loading"):
            raise EngineUnavailable(status.reason or f"The engine is {status.state}.", retry_after=1)
        probe = 0 if circuit is None else await circuit.admit()
        self._epoch = 0 if circuit is None else circuit.epoch
        source = self._source = self._model.engine.generate(request)
        began = time.monotonic()
        failed: bool | None = None
        death = False
        try:
            batch = await source.__anext__()
            self._first_token = max(1e-9, time.monotonic() - began)
            slow = self._first_token >= self._asker.slow
            # A probe had no queue to wait in; of any other slow call only its report says where the time went.
            failed = slow if probe or not slow else None
            self._next = source.__anext__
            return batch
        except HeadraceError as error:
            death = isinstance(error, EngineDied)
            if self._counts(error):
                failed = True
            elif probe and error.status < 500:
                failed = False  # it took a look at the request and refused it: it works
            raise
        finally:
            if circuit is not None and probe:
                circuit.probed(probe, None if failed is None else not failed)
            elif circuit is not None and failed is not None:
                circuit.note(self._epoch, failed=failed, death=death)

    def _counts(self, error: HeadraceError) -> bool:
        """Whether it is the engine's failure. A refused request is the client's, and one that broke alone is its own; so is a deadline
        that the client set, or of which another engine had used up a part. What the server ends as it stops is nobody's. An engine that
        is being started is the supervisor's matter, and is trusted once it is ready."""
        if isinstance(error, NotAdmitted) or (isinstance(error, EngineUnavailable) and error.leaving):
            return False
        if isinstance(error, EngineDied):
            return True
        if self._model.status.state != "ready" or (isinstance(error, DeadlineExceeded) and self._client_deadline):
            return False
        return isinstance(error, DeadlineExceeded | UpstreamError | EngineUnavailable | Overloaded)
