"""Refuses at once what the engine's worker would refuse, by what it last said of its queue: no bill, no reservation, no way to it and back.

Where nothing fresh is known the request goes on, and the worker decides. It says something for as long as it refuses requests, so while a
model is overloaded nearly all refusals are made here. Comes after the cache and after degrading: an answer that needs no engine, or another
one, isn't refused for this one's queue.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from headrace.errors import HeadraceError
from headrace.served import ServedModels
from headrace.types import Call, GenerateRequest
from headrace.unwinding import before
from headrace.waiting import Bounds, Newcomer, Queue, is_full, no_room, place, who_gives_way


@runtime_checkable
class TellsCrowd(Protocol):
    """The client of an engine that says how crowded its queue is."""

    def crowd(self) -> tuple[Queue, Bounds] | None:
        """The queue, if it is crowded and that is known of late."""
        ...


class Admit:
    """Raises `NotAdmitted` and `QueueShareFull`."""

    def __init__(self, models: ServedModels) -> None:
        self._models = models
        # Asked once: whether something is of a protocol takes Python longer than all the rest of this step.
        self._telling = {model.files.name: model.engine for model in models if isinstance(model.engine, TellsCrowd)}

    @before
    async def __call__(self, call: Call) -> None:
        if call.source is None and call.request is not None:
            engine = self._telling.get(self._models.find(call.served_model).files.name)
            if engine is not None and (crowd := engine.crowd()) is not None:
                refusal = foreseen(*crowd, call.request)
                if refusal is not None:
                    raise refusal


def foreseen(queue: Queue, bounds: Bounds, request: GenerateRequest) -> HeadraceError | None:
    """Why the worker would refuse the request, if so; where it might put out another for it, it is asked."""
    newcomer = Newcomer.of(request)
    found = place(queue, bounds, newcomer)
    if isinstance(found, HeadraceError):
        return found
    if is_full(queue, bounds, newcomer) and who_gives_way(queue.lines, newcomer) is None:
        return no_room(queue, bounds, newcomer)
    return None
