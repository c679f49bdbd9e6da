"""Drives a `Stepper` by hand, on a clock of its own, and keeps what every request was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fake_runner import FakeRunner, LetterTokenizer

from headrace.engine.stepper import Stepper
from headrace.errors import HeadraceError
from headrace.types import Delta, Event, GenerateRequest, PromptScores, Report, Sampling


@dataclass
class Answer:
    events: list[Event] = field(default_factory=list)
    error: HeadraceError | None = None

    def __call__(self, events: Sequence[Event] | HeadraceError) -> None:
        assert self.error is None, "something came after the error"
        assert self.report is None, "something came after the report"
        if isinstance(events, HeadraceError):
            self.error = events
        else:
            assert events
            self.events += events

    @property
    def report(self) -> Report | None:
        return self.events[-1] if self.events and isinstance(self.events[-1], Report) else None

    @property
    def ended(self) -> bool:
        return self.error is not None or self.report is not None

    @property
    def scores(self) -> PromptScores | None:
        return next((event for event in self.events if isinstance(event, PromptScores)), None)

    def deltas(self, choice: int = 0) -> list[Delta]:
        return [event for event in self.events if isinstance(event, Delta) and event.choice == choice]

    def tokens(self, choice: int = 0) -> list[int]:
        """The completion's tokens; their indices must be without gap or repetition."""
        tokens: list[int] = []
        for delta in self.deltas(choice):
            assert delta.index == len(tokens)
            tokens += delta.tokens
        return tokens

    def text(self, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(choice))

    def last(self, choice: int = 0) -> Delta:
        deltas = self.deltas(choice)
        assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        return deltas[-1]


class Driven:
    """A stepper over a fake runner; `now` only moves when a test moves it."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_sequences: int = 8,
        step_tokens: int = 16,
        prefix_cache: bool = True,
        context_length: int = 200,
        memory: int = 0,
        prompt_lookup: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.now = 0.0
        self.runner = FakeRunner(num_blocks=num_blocks, block_size=block_size, memory=memory)
        self.stepper = Stepper(
            self.runner,
            LetterTokenizer(),
            context_length=context_length,
            max_sequences=max_sequences,
            step_tokens=step_tokens,
            prefix_cache=prefix_cache,
            prompt_lookup=prompt_lookup,
            deterministic=deterministic,
            clock=lambda: self.now,
        )
        self.answers: dict[str, Answer] = {}

    def add(
        self, prompt: list[int], *, name: str | None = None, tenant: int = 0, timeout: float | None = None, **sampling: object
    ) -> Answer:
        name = name or f"request-{len(self.answers)}"
        answer = self.answers[name] = Answer()
        wanted = Sampling(**{"max_tokens": 5, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
        request = GenerateRequest(id=name, prompt=prompt, sampling=wanted, tenant=tenant, timeout=timeout)
        self.stepper.add(request, answer, self.now)
        return answer

    def step(self) -> None:
        self.stepper.step()
        outbox, self.stepper.outbox = self.stepper.outbox, []
        for deliver, events in outbox:
            deliver(events)

    def drain(self, most: int = 2000) -> None:
        while not self.stepper.idle:
            self.step()
            most -= 1
            assert most, "the work doesn't end"
        self.clean()

    def clean(self) -> None:
        """Nothing is left behind."""
        stats = self.stepper.stats()
        assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)
        scheduler = self.stepper._scheduler
        assert scheduler.pool.available == scheduler.pool.num_blocks
        assert not scheduler._promised
        assert not scheduler._sources
        assert len(scheduler.tenants) == 0
