"""Engines that fail as they are told, behind the steps of an attempt: what the tests of breaker, retry and fallback are made of."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from headrace.call import Call
from headrace.config import ResilienceSection, ServerSection
from headrace.errors import HeadraceError
from headrace.journey import Journey
from headrace.models.byte_tokenizer import ByteTokenizer
from headrace.policies.ask_engine import AskEngine
from headrace.policies.authorize import Authorize
from headrace.policies.breaker import Breaker, BreakerRules
from headrace.policies.circuit import Circuit
from headrace.policies.prepare import Prepare
from headrace.policies.route import Fallbacks, OldAnswers
from headrace.ports import Step
from headrace.served import ServedModel, ServedModels
from headrace.types import Delta, EngineCard, EngineStats, EngineStatus, Event, GenerateRequest, ModelFiles, Report, Sampling

CAPABILITIES = frozenset({"tokens", "seed", "n", "min_tokens", "logit_bias", "stop_token_ids"})

Turn = HeadraceError | list[Event] | Callable[[], None]


class FlakyEngine:
    """Each request takes the next of `turns`, or else answers `text`. A turn is a list of what is yielded, raised or called."""

    def __init__(self, text: str = "fine") -> None:
        self.text = text
        self.turns: list[Sequence[Turn]] = []
        self.always: Sequence[Turn] | None = None
        self.requests: list[GenerateRequest] = []
        self.closed = 0
        self.waiting = 0

    async def start(self) -> EngineCard:
        raise NotImplementedError

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        self.requests.append(request)
        answer: Sequence[Turn] = self.always if self.always is not None else said(self.text, prompt=len(request.prompt))
        try:
            for turn in self.turns.pop(0) if self.turns else answer:
                if isinstance(turn, HeadraceError):
                    raise turn
                if isinstance(turn, list):
                    yield turn
                else:
                    turn()
        finally:
            self.closed += 1

    def stats(self) -> EngineStats:
        return EngineStats(waiting=self.waiting)

    async def close(self) -> None: ...


def said(text: str, *, prompt: int = 1, queue_ms: float = 0.0) -> list[list[Event]]:
    pieces: list[list[Event]] = [[Delta(0, place, (place,), letter)] for place, letter in enumerate(text)]
    return [*pieces, [Delta(0, len(text), (0,), "", "stop"), Report(prompt, 0, len(text), queue_ms, 1.0, 1.0)]]


def served(name: str, engine: FlakyEngine, *, context: int = 4096, fingerprint: str | None = None) -> ServedModel:
    mark = name if fingerprint is None else fingerprint
    card = EngineCard(model=name, kind="echo", context_length=context, vocab_size=259, fingerprint=mark, capabilities=CAPABILITIES)
    files = ModelFiles(name=name, kind="echo", context_length=context, fingerprint=mark)
    return ServedModel(files, engine, ByteTokenizer(), card=card, status=EngineStatus(state="ready"))


class LocalPlace:
    """`CircuitPlace` without a supervisor, on a clock that only moves when it is told to."""

    def __init__(self, rules: BreakerRules) -> None:
        self.now = 1000.0
        self.breaker = Breaker(rules)
        self.circuits: list[Circuit] = []

    def report(self, model: str, epoch: int, calls: int, failures: int) -> None:
        self.breaker.note(epoch, calls, failures, self.now)
        self.tell()

    async def probe(self, model: str) -> int | None:
        return self.breaker.probe(None, self.now)

    def probed(self, model: str, number: int, succeeded: bool | None) -> None:
        self.breaker.probed(number, succeeded, self.now)
        self.tell()

    def forward(self, seconds: float) -> None:
        self.now += seconds
        self.breaker.advance(self.now)
        self.tell()

    def tell(self) -> None:
        for circuit in self.circuits:
            circuit.changed(self.breaker.state, self.breaker.epoch, self.breaker.wait(self.now))


class Gateway:
    """A journey over some models, with all that makes it resilient."""

    def __init__(
        self,
        *models: ServedModel,
        steps: Sequence[Step] = (),
        old: OldAnswers | None = None,
        timeout: float = 60.0,
        **settings: object,
    ) -> None:
        section = ResilienceSection.model_validate(settings)
        self.models = ServedModels(list(models))
        self.place = LocalPlace(BreakerRules.of(section))
        self.circuit = Circuit(models[0].files.name, models[0].public_name, self.place)
        self.place.circuits.append(self.circuit)
        self.prepare = Prepare(self.models, ServerSection(request_timeout=timeout))
        circuits = {models[0].files.name: self.circuit} if section.breaker == "on" else None
        asking = AskEngine(self.models, section, circuits)
        fallbacks = Fallbacks(self.models, section.fallbacks, old=old) if section.fallbacks else None
        attempt: list[Step] = [Authorize(self.models), self.prepare, *steps, asking]
        self.journey = Journey((), self.models, attempt=attempt, fallbacks=fallbacks)

    async def text(self, call: Call) -> str:
        out = ""
        async with aclosing(self.journey.run(call)) as batches:
            async for batch in batches:
                out += "".join(event.text for event in batch if isinstance(event, Delta))
        return out


def asked(text: str = "hello", **fields: object) -> Call:
    sampling = fields.pop("sampling", Sampling(max_tokens=64))
    made = Call(id="r", route="/chat", model=None, sampling=sampling, text=text, tenant=1, started_at=time.monotonic())  # type: ignore[arg-type]
    for name, value in fields.items():
        setattr(made, name, value)
    return made
