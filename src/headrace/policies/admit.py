"""Refuses at once what the engine's worker would refuse, by what it last said of its queue: no bill, no reservation, no way to it and back.

Where nothing fresh is known the request goes on, and the worker decides. It says something for as long as it refuses requests, so while a
model is overloaded nearly all refusals are made here. Comes after the cache and after degrading: an answer that needs no engine, or another
one, isn't refused for this one's queue.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from headrace.call import Call
from headrace.policies.cache import wanted
from headrace.served import ServedModels
from headrace.unwinding import before
from headrace.waiting import Bounds, Newcomer, Queue, foreseen


@runtime_checkable
class TellsCrowd(Protocol):
    """The client of an engine that says how crowded its queue is."""

    def crowd(self) -> tuple[Queue, Bounds] | None:
        """The queue, if it is crowded and that is known of late."""
        ...

    def let_in(self, newcomer: Newcomer) -> None:
        """That request goes there."""
        ...


class Admit:
    """Raises `NotAdmitted` and `QueueShareFull`."""

    def __init__(self, crowds: Crowds) -> None:
        self._crowds = crowds

    @before
    async def __call__(self, call: Call) -> None:
        if call.source is None and call.request is not None and (crowd := self._crowds.of(call.served_model)) is not None:
            newcomer = Newcomer.of(call.request)
            refusal = foreseen(*crowd, newcomer)
            if refusal is not None:
                raise refusal
            self._crowds.let_in(call.served_model, newcomer)


class TurnAway:
    """Refuses, before a prompt is read, what will be refused with as many tokens as it has at least: reading prompts is much of what
    refusals cost, and under overload most answers are refusals. What the cache may have an answer for is let through.

    Raises `NotAdmitted` and `QueueShareFull`.
    """

    def __init__(self, crowds: Crowds) -> None:
        self._crowds = crowds

    @before
    async def __call__(self, call: Call) -> None:
        crowd = self._crowds.of(call.model)
        if crowd is not None and wanted(call) != "all":
            refusal = foreseen(*crowd, Newcomer(call.tenant, call.priority, least_tokens(call), call.sampling.n))
            if refusal is not None:
                call.served_model = self._crowds.name(call.model)
                raise refusal


def least_tokens(call: Call) -> int:
    """Of the prompt. Tokenizers rarely make fewer of a text than a quarter of its characters; who is refused for that was at the limit."""
    if call.tokens is not None:
        return len(call.tokens)
    size = len(call.text or "") + sum(len(message.content) for message in call.messages or ())
    return max(1, size // 4)


class Crowds:
    """What the engines of models said of their queues."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        # Asked once: whether something is of a protocol takes Python longer than all the rest of these steps.
        self._telling = {model.files.name: model.engine for model in models if isinstance(model.engine, TellsCrowd)}

    def of(self, name: str | None) -> tuple[Queue, Bounds] | None:
        """The queue of the model of that name, None for the default one, if it is crowded."""
        engine = self._telling.get(self._models.find(name).files.name)
        return None if engine is None else engine.crowd()

    def name(self, name: str | None) -> str:
        """The model's own, by which metrics know it."""
        return self._models.find(name).files.name

    def let_in(self, name: str | None, newcomer: Newcomer) -> None:
        """A request goes to that model."""
        engine = self._telling.get(self._models.find(name).files.name)
        if engine is not None:
            engine.let_in(newcomer)
