"""Who answers: the model that was asked for, or, where it can't, its fallbacks in their order.

A fallback answers from its beginning or not at all: nothing is tried any more once the first events are there, so that no answer is ever
spliced together. Every candidate goes through the steps as if it had been asked for: authorised, prepared, reserved, billed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from headrace.call import Call, Outcome
from headrace.errors import DeadlineExceeded, HeadraceError, NotAdmitted, QueueShareFull, RateLimited, StoreUnavailable
from headrace.policies.ask_engine import FALLBACK_HEADER, MODEL_HEADER
from headrace.policies.degrade import HEADER as DEGRADED_HEADER
from headrace.policies.degrade import names_token_ids
from headrace.policies.relay import Relay
from headrace.served import ServedModel, ServedModels
from headrace.types import Delta, Event, GenerateRequest, Report
from headrace.unwinding import Unwinding

HEADER = FALLBACK_HEADER
"""Its value is the code of the error that made a fallback necessary."""
CANNED = "canned"
"""What the model header says for a configured answer."""

Attempt = Callable[[Call, Unwinding], Awaitable[AsyncIterator[list[Event]]]]
"""Enters the steps for a call as it stands, and gives the source of its events."""


class OldAnswers(Protocol):
    """Answers that were kept, and may have expired since."""

    async def old(self, call: Call, request: GenerateRequest, model: ServedModel) -> list[list[Event]] | None:
        """What a model once answered to this very request."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    kind: Literal["model", "cache", "canned"]
    text: str = ""
    """A model's name, or the canned answer."""


def candidate(entry: str) -> Candidate:
    """What an entry of a configured chain means: `cache`, `canned: TEXT`, or a model."""
    if entry == "cache":
        return Candidate("cache")
    if entry.startswith("canned:"):
        return Candidate("canned", entry.removeprefix("canned:").strip())
    return Candidate("model", entry)


class Fallbacks:
    """`chains` by the name of the model that was asked for, entries as configured."""

    def __init__(self, models: ServedModels, chains: Mapping[str, Sequence[str]], *, old: OldAnswers | None = None) -> None:
        self._models = models
        self._chains = {models.find(name).files.name: tuple(map(candidate, chain)) for name, chain in chains.items()}
        self._chains |= {name: tuple(map(candidate, chain)) for name, chain in chains.items()}
        self._old = old

    async def open(self, call: Call, entered: Unwinding, attempt: Attempt) -> AsyncIterator[list[Event]]:
        """Events of the first candidate that begins to answer. Its steps are left with `entered`, those of the others at once.

        Raises what the model that was asked for raised, where it refuses the request, or where no fallback can answer either.
        """
        model = self._models.find(call.model)
        # That of a family holds for the versions that have none of their own.
        chain = self._chains.get(model.files.name) or self._chains.get(model.family, ())
        if not chain:
            return await attempt(call, entered)
        start = _Start(call)
        call.others_left = True
        begun = await _begin(call, entered, attempt)
        if not isinstance(begun, HeadraceError):
            return begun
        failure, request = begun, call.request
        for number, each in enumerate(chain, 1):
            start.again(call, number, failure.code)
            call.others_left = number < len(chain)
            if each.kind == "canned":
                return _said(call, canned(each.text, call.sampling.n), CANNED)
            if each.kind == "cache":
                answer = await self._old.old(call, request, model) if self._old is not None and request is not None else None
                if answer is not None:
                    return _said(call, answer, model.public_name)
            elif (other := self._models.find(each.text)) is not model and _speaks_to(other, model, call):
                asked, call.model = call.model, each.text
                try:
                    begun = await _begin(call, entered, attempt)
                except DeadlineExceeded:
                    raise
                except HeadraceError as refusal:
                    # It can't take what the first one took: too long for it, or not for this key.
                    begun = refusal
                finally:
                    call.model = asked
                if not isinstance(begun, HeadraceError):
                    return begun
        start.restore(call)
        raise failure


class _Start:
    """How a call stood before its first candidate."""

    def __init__(self, call: Call) -> None:
        self._id, self._model = call.id, call.model
        self._transforms, self._taps = len(call.transforms), len(call.taps)
        self._headers = dict(call.headers)

    def again(self, call: Call, number: int, reason: str) -> None:
        """Make the call ready for another candidate. What comes now is a fallback's answer."""
        self._clean(call)
        # An id of its own: the bill has a row for each candidate.
        call.id = f"{self._id}-fallback{number}"
        call.headers[HEADER] = reason
        call.storable = False

    def restore(self, call: Call) -> None:
        """No fallback could answer: the call is what it was."""
        outcome = call.outcome
        self._clean(call)
        call.id, call.outcome = self._id, outcome

    def _clean(self, call: Call) -> None:
        call.model = self._model
        call.request = call.source = call.share = None
        del call.transforms[self._transforms :]
        del call.taps[self._taps :]
        for name in (HEADER, DEGRADED_HEADER):
            call.headers.pop(name, None)
        call.ended = False
        call.outcome = Outcome()


class Begun(Relay):
    """A source whose first batch is here already."""

    __slots__ = ("_first",)

    def __init__(self, first: list[Event], source: AsyncIterator[list[Event]]) -> None:
        self._first = first
        self._source = source
        self._next = self._again

    async def _again(self) -> list[Event]:
        assert self._source is not None
        self._next = self._source.__anext__
        return self._first


async def _begin(call: Call, entered: Unwinding, attempt: Attempt) -> AsyncIterator[list[Event]] | HeadraceError:
    """The source, with its first batch; or the error, where it failed before it began in a way that another candidate may not.

    Raises what else went wrong: refusals by the steps, and by the engine.
    """
    asked = False
    try:
        async with Unwinding() as steps:
            try:
                source = await attempt(call, steps)
                asked = True
                begun = Begun(await source.__anext__(), source)
            except BaseException as error:
                call.outcome.error = error  # the steps settle by it
                raise
            entered.take_over(steps)
            return begun
    except StopAsyncIteration:
        return _given([])
    except HeadraceError as error:
        if (asked or isinstance(error, NotAdmitted | QueueShareFull)) and _others_may_do_better(error):
            return error
        raise


def _others_may_do_better(error: HeadraceError) -> bool:
    """Of errors of engines. A rate limit here is the upstream's; the caller's own is a step's."""
    return isinstance(error, RateLimited) or (error.status >= 500 and not isinstance(error, DeadlineExceeded | StoreUnavailable))


def _speaks_to(other: ServedModel, model: ServedModel, call: Call) -> bool:
    """Whether the request means the same to another model."""
    return not names_token_ids(call) or other.files.fingerprint == model.files.fingerprint


def canned(text: str, choices: int) -> list[list[Event]]:
    """A configured answer as events; it costs no tokens."""
    said: list[Event] = [Delta(choice, 0, (), text, "stop") for choice in range(choices)]
    return [[*said, Report(0, 0, 0, 0.0, 0.0, 0.0)]]


def _said(call: Call, batches: list[list[Event]], model: str) -> AsyncIterator[list[Event]]:
    call.headers[MODEL_HEADER] = model
    return _given(batches)


async def _given(batches: list[list[Event]]) -> AsyncIterator[list[Event]]:
    for batch in batches:
        yield batch
