"""The journey of one request: the steps in order, then the source of events, then the steps in reverse.

Read `Journey.run`; it is the whole story. Which steps there are, and in which order, is in `Journey.standard`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from hashlib import sha256

from headrace.call import Call, Sink
from headrace.config import Config
from headrace.policies.admit import Admit, Crowds, TurnAway
from headrace.policies.ask_engine import AskEngine
from headrace.policies.authorize import Authorize
from headrace.policies.cache import ResponseCache
from headrace.policies.callers import Callers
from headrace.policies.circuit import Circuit
from headrace.policies.claimants import Claimants
from headrace.policies.degrade import Degrade
from headrace.policies.filter_input import filter_steps
from headrace.policies.identify import Identify
from headrace.policies.ledger import KeepBooks
from headrace.policies.prepare import Prepare
from headrace.policies.reserve import Reserve
from headrace.policies.route import Fallbacks
from headrace.policies.shadow import Shadow, Told
from headrace.policies.turns import Turns
from headrace.ports import Answers, Books, HandsOver, Limits, Step, hands_over
from headrace.served import ServedModels
from headrace.types import Event
from headrace.unwinding import Unwinding


class Journey:
    """Runs calls through the steps: those of the request once, those of an attempt for each model that is asked."""

    def __init__(
        self, steps: Sequence[Step], models: ServedModels, *, attempt: Sequence[Step] = (), fallbacks: Fallbacks | None = None
    ) -> None:
        self._steps = tuple(steps)
        self._attempt_steps = tuple(attempt)
        self._models = models
        self._fallbacks = fallbacks

    @classmethod
    def standard(
        cls,
        config: Config,
        models: ServedModels,
        *,
        callers: Callers | None = None,
        answers: Answers | None = None,
        turns: Turns | None = None,
        limits: Limits | None = None,
        claimants: Claimants | None = None,
        books: Books | None = None,
        circuits: Mapping[str, Circuit] | None = None,
        trace: Step | None = None,
        shadowed: Told | None = None,
    ) -> Journey:
        """The steps that a configuration asks for. Without `callers` only configured keys are known; without `answers` none are kept, and
        without `turns` no other process makes them; without `limits` nobody has any, and `claimants` says whose a call counts for; without
        `books` nothing is billed; without `circuits` no engine is left alone; `shadowed` hears how copies of requests were answered, and
        without it there are none."""
        resilience = config.resilience
        claimants = claimants or Claimants(config.limits.anonymous_limit, beyond_loopback=False)
        steps: list[Step] = [] if trace is None else [trace]
        steps.append(Identify(callers or Callers(config.access)))
        steps += filter_steps(config.filters, models=models)
        prepare = Prepare(models, config.server)
        crowds = Crowds(models)
        attempt: list[Step] = [Authorize(models)]
        if resilience.degrade_queue is None:
            attempt.append(TurnAway(crowds))
        attempt.append(prepare)
        cache = None
        if answers is not None:
            filters = sha256(config.filters.model_dump_json().encode()).digest()
            cache = ResponseCache(answers, models, cached_price=config.cache.cached_price, salt=filters, turns=turns)
            attempt.append(cache)
        if resilience.degrade_queue is not None:
            attempt.append(Degrade(models, resilience, prepare))
        attempt.append(Admit(crowds))
        if limits is not None:
            attempt.append(Reserve(claimants, limits))
        if books is not None:
            attempt.append(KeepBooks(books, config.ledger.currency))
        if shadowed is not None:
            attempt.append(Shadow(models, prepare, shadowed))
        attempt.append(AskEngine(models, resilience, circuits))
        fallbacks = None
        if resilience.fallbacks:
            fallbacks = Fallbacks(models, resilience.fallbacks, old=cache)
        return cls(steps, models, attempt=attempt, fallbacks=fallbacks)

    async def run(self, call: Call) -> AsyncGenerator[list[Event]]:
        """Event batches of one call. Close the generator (`contextlib.aclosing`) to hang up.

        Raises `HeadraceError`s; those that refuse the call come before the first batch. When it is over,
        however it ended, `call.outcome` is complete.
        """
        async with Unwinding() as entered:
            try:
                for step in self._steps:
                    await entered.enter(step(call))
                if self._fallbacks is None:
                    source = await self._attempt(call, entered)
                else:
                    source = await self._fallbacks.open(call, entered, self._attempt)
                handed_over = False
                async for batch in source:
                    batch = _passed(call, batch)
                    if batch:
                        yield batch
                    if call.ended:
                        break
                    if call.sink is not None and not handed_over:
                        handed_over = True
                        if hands_over(source):
                            source.hand_to(_Passing(call, call.sink, source).take)
            except BaseException as error:
                # Set before the steps leave: they settle by it. A hang-up arrives here as GeneratorExit or CancelledError.
                call.outcome.error = error
                raise

    async def _attempt(self, call: Call, entered: Unwinding) -> AsyncIterator[list[Event]]:
        """The steps for the model that the call asks for now, and the source of its events."""
        for step in self._attempt_steps:
            await entered.enter(step(call))
        source = call.source
        if source is None:
            assert call.request is not None, "the prepare step makes the request"
            source = call.source = self._models.find(call.served_model).engine.generate(call.request)
        if call.share is not None:
            source = call.share(source)
        entered.close(source)
        return source


def _passed(call: Call, batch: list[Event]) -> list[Event]:
    """What leaves the journey of a batch that has come in."""
    for transform in call.transforms:
        batch = transform(batch)
    if batch:
        call.outcome.note(batch)
        for tap in call.taps:
            tap(batch)
    return batch


class _Passing:
    """Batches go from the source to the sink directly, whenever both are ready; else they are read, as ever.

    For each token it is found in memory that other things have taken the caches' room of since the last: so it looks at little.
    """

    __slots__ = ("_call", "_outcome", "_sink", "_source")

    def __init__(self, call: Call, sink: Sink, source: HandsOver) -> None:
        self._call = call if call.transforms or call.taps else None
        self._outcome = call.outcome
        self._sink = sink
        self._source = source

    def take(self, batch: list[Event]) -> bool:
        sink, call = self._sink, self._call
        if not sink.ready():
            return False
        try:
            if call is None:
                self._outcome.note(batch)
                sink.put(batch)
                return True
            batch = _passed(call, batch)
            if batch:
                sink.put(batch)
        except Exception as error:  # noqa: BLE001 - it is this call's, and raised in its own task; the source is at work for others, too
            self._source.stop(error)
        else:
            if call.ended:
                self._source.stop()
        return True
