"""An engine in virtual time behind the real admission: what becomes of requests that come faster than it can serve them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.config import OverloadSection
from headrace.engine.admission import Admission, Entry
from headrace.engine.held import Held, HeldBack
from headrace.errors import HeadraceError
from headrace.types import GenerateRequest, Priority, Sampling

FIXED, PER_TOKEN = 0.010, 0.0005
"""Seconds of a step, and of each token in it."""
LONGEST_STEP = 0.15
TICK = 0.1


@dataclass
class Outcome:
    arrived: float
    tenant: int = 5
    priority: Priority = "default"
    refused: HeadraceError | None = None
    refused_at: float = 0.0
    first: float | None = None
    last: float | None = None
    tokens: int = 0

    @property
    def good(self) -> bool:
        if self.refused is not None or self.first is None or self.last is None:
            return False
        return self.first - self.arrived <= 2.0 and (self.last - self.first) / max(1, self.tokens - 1) <= 0.2


@dataclass
class _Job:
    outcome: Outcome
    entry: Entry
    prompt: int
    most: int
    done: int = 0


class OverloadedEngine:
    """Continuous batching as ours does it: a step decodes all that run, and spends the rest of its time on prompts."""

    def __init__(
        self, section: OverloadSection | None = None, *, slots: int = 64, slowness: Callable[[float], float] = lambda _: 1.0
    ) -> None:
        self.now = 0.0
        self.slots = slots
        self.slowness = slowness
        self.admission = Admission(section or OverloadSection(), slots=slots, clock=lambda: self.now)
        self.held = HeldBack(self.admission)
        self.waiting: deque[_Job] = deque()
        self.prefilling: list[list[int]] = []
        self.running: list[_Job] = []
        self.outcomes: list[Outcome] = []
        self.numbers = 0

    def arrive(
        self,
        tenant: int = 5,
        priority: Priority = "default",
        prompt: int = 100,
        most: int = 32,
        timeout: float = 600.0,
        *,
        may_end: bool = False,
    ) -> Outcome:
        outcome = Outcome(self.now, tenant, priority)
        self.outcomes.append(outcome)
        self.numbers += 1
        sampling = Sampling(max_tokens=most, ignore_eos=not may_end)
        request = GenerateRequest(
            id=str(self.numbers), prompt=[1] * prompt, sampling=sampling, tenant=tenant, priority=priority, timeout=timeout
        )
        cancel: list[Callable[[], None]] = []
        try:
            entry = self.admission.admit(request, lambda: cancel[0]())
        except HeadraceError as error:
            outcome.refused, outcome.refused_at = error, self.now
            return outcome
        job = _Job(outcome, entry, prompt, most)

        def over() -> None:
            if job in self.waiting:
                self.waiting.remove(job)
            outcome.refused, outcome.refused_at = entry.shed, self.now
            self.admission.ended(entry)

        def start() -> Callable[[], None]:
            self.waiting.append(job)
            return over

        if entry.held:
            held = Held(entry, start, over)
            cancel.append(held.cancel)
            self.held.add(held)
            self.held.release()
        else:
            cancel.append(start())
        return outcome

    def run(self, arrivals: Sequence[tuple[float, dict[str, object]]], until: float) -> list[Outcome]:
        """Let requests arrive at their times, and step in between."""
        come = deque(sorted(arrivals, key=lambda arrival: arrival[0]))
        while self.now < until:
            end = self.now + self._step_seconds()
            while come and come[0][0] <= end:
                self.now = max(self.now, come[0][0])
                self.arrive(**come.popleft()[1])  # type: ignore[arg-type]
            self.now = end
            self._finish_step()
        return self.outcomes

    def _step_seconds(self) -> float:
        """Plan a step: who decodes, and which prompts are computed."""
        self.step: list[_Job] = []
        seconds = FIXED + PER_TOKEN * len(self.running)
        while self.waiting and len(self.running) + len(self.step) < self.slots:
            cost = PER_TOKEN * self.waiting[0].prompt
            if self.step and seconds + cost > LONGEST_STEP:
                break
            seconds += cost
            self.step.append(self.waiting.popleft())
        if not self.running and not self.step:
            return 0.01
        return seconds * self.slowness(self.now)

    def _finish_step(self) -> None:
        ended = []
        for job in (*self.running, *self.step):
            job.done += 1
            job.outcome.tokens += 1
            job.outcome.last = self.now
            if job.outcome.first is None:
                job.outcome.first = self.now
            self.admission.progressed(job.entry, 1)
            if job.done == job.most:
                ended.append(job)
        self.running += self.step
        for job in ended:
            self.running.remove(job)
            self.admission.ended(job.entry)
        self.held.release()


def steady(rate: float, begin: float, end: float, **request: object) -> list[tuple[float, dict[str, object]]]:
    """Arrivals at a steady rate."""
    return [(begin + number / rate, dict(request)) for number in range(int(rate * (end - begin)))]


def goodput(outcomes: Sequence[Outcome], begin: float, end: float) -> float:
    """Good requests a second, of those that arrived between."""
    return sum(outcome.good for outcome in outcomes if begin <= outcome.arrived < end) / (end - begin)
