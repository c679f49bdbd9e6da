"""Gives a copy of a request to another model, once it is answered, and compares the answers: how would a new version do?

The copy costs the caller nothing: it is on no bill, takes from no limit, and begins when the answer is complete. It is the first to give
way where there is much to do. Its answer goes nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from difflib import SequenceMatcher

import msgspec

from headrace.call import Call
from headrace.errors import HeadraceError
from headrace.ports import Step
from headrace.served import ServedModels
from headrace.types import Delta, Event

MOST_AT_ONCE = 8
"""Copies that wait for their answers; what comes beyond them isn't copied."""
LONGEST = 4096
"""Characters of each answer that are compared."""

Told = Callable[[str, str, float], None]
"""The model that answered, the one that got the copy, and how like its answer is, 0 to 1; -1 where it failed."""


class Shadow:
    """Makes copies for calls whose `shadow` names a model. `prepare` makes the request in that model's words."""

    def __init__(self, models: ServedModels, prepare: Step, told: Told) -> None:
        self._models = models
        self._prepare = prepare
        self._told = told
        self._under_way: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        if not call.shadow:
            yield
            return
        said: list[str] = []
        call.taps.append(lambda batch: said.extend(_texts(batch)))
        yield
        outcome = call.outcome
        if outcome.error is None and outcome.served_from == "engine" and outcome.finish is not None and len(self._under_way) < MOST_AT_ONCE:
            task = asyncio.create_task(self._compare(self._copy(call), call.served_model or "", "".join(said)), name="shadow")
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    @staticmethod
    def _copy(call: Call) -> Call:
        return Call(
            id=f"{call.id}-shadow",
            route=call.route,
            model=call.shadow,
            # Its first choice is all that is compared.
            sampling=msgspec.structs.replace(call.sampling, n=1, logprobs=None, prompt_logprobs=None),
            messages=call.messages,
            text=call.text,
            tokens=call.tokens,
            tenant=call.tenant,
            priority="sheddable",
        )

    async def _compare(self, copy: Call, model: str, answer: str) -> None:
        said = ""
        try:
            async with self._prepare(copy):
                assert copy.request is not None, "the prepare step makes the request"
                async with aclosing(self._models.find(copy.model).engine.generate(copy.request)) as batches:  # type: ignore[type-var]
                    async for batch in batches:
                        said += "".join(_texts(batch))
        except HeadraceError:
            self._told(model, copy.model or "", -1.0)
        else:
            self._told(model, copy.model or "", likeness(answer, said))


def likeness(one: str, other: str) -> float:
    """0 to 1: which part of the words of both is the same, in the same order."""
    words, others = one[:LONGEST].split(), other[:LONGEST].split()
    return 1.0 if words == others else SequenceMatcher(None, words, others, autojunk=False).ratio()


def _texts(batch: list[Event]) -> list[str]:
    return [event.text for event in batch if isinstance(event, Delta) and event.choice == 0]
