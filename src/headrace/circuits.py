"""The circuit breakers of all engines, for all API processes: they live in the supervisor, as long as the engines do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import structlog

from headrace.control import AskProbe, CircuitCalls, CircuitChanged, ProbeAnswer, ProbeEnded
from headrace.policies.breaker import Breaker, BreakerRules


class CircuitTable:
    """`announce` is called with every change of state, for all API processes. Used on the event loop."""

    def __init__(
        self,
        models: Iterable[str],
        rules: BreakerRules,
        announce: Callable[[CircuitChanged], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._breakers = {model: Breaker(rules) for model in models}
        self._announce = announce
        self._clock = clock

    def standing(self) -> list[CircuitChanged]:
        """How all of them are, for a process that has just begun."""
        return [self._said(model) for model in self._breakers]

    def add(self, model: str, rules: BreakerRules) -> None:
        """A further model."""
        self._breakers[model] = Breaker(rules)

    def remove(self, model: str) -> None:
        del self._breakers[model]

    def judge_by(self, rules: BreakerRules) -> None:
        """Other rules from now on; how the breakers stand, they stand."""
        for breaker in self._breakers.values():
            breaker.rules = rules

    def hear(self, message: CircuitCalls | ProbeEnded | AskProbe, holder: object) -> ProbeAnswer | None:
        """What an API process says; the answer, if it wants one."""
        breaker, now = self._breakers[message.model], self._clock()
        epoch = breaker.epoch
        answer = None
        if isinstance(message, CircuitCalls):
            breaker.note(message.epoch, message.calls, message.failures, now)
        elif isinstance(message, ProbeEnded):
            breaker.probed(message.probe, message.succeeded, now)
        else:
            answer = ProbeAnswer(message.number, breaker.probe(holder, now))
        self._changed(message.model, epoch)
        return answer

    def lapse(self, holder: object) -> None:
        """A process is gone."""
        for breaker in self._breakers.values():
            breaker.lapse(holder)

    def _advance(self, model: str) -> None:
        breaker = self._breakers[model]
        epoch = breaker.epoch
        breaker.advance(self._clock())
        self._changed(model, epoch)
        if breaker.epoch == epoch and breaker.state == "open":  # the timer was early
            self._advance_later(model)

    def _changed(self, model: str, epoch: int) -> None:
        breaker = self._breakers[model]
        if breaker.epoch == epoch:
            return
        structlog.get_logger("headrace.circuits").warning("circuit breaker", model=model, state=breaker.state)
        self._announce(self._said(model))
        if breaker.state == "open":
            self._advance_later(model)

    def _advance_later(self, model: str) -> None:
        asyncio.get_running_loop().call_later(max(0.001, self._breakers[model].wait(self._clock())), self._advance, model)

    def _said(self, model: str) -> CircuitChanged:
        breaker = self._breakers[model]
        return CircuitChanged(model, breaker.state, breaker.epoch, breaker.wait(self._clock()))
