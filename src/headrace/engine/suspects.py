"""Who has the engine while requests are suspected of killing it: one suspect at a time, alone, until it has got on.

A suspect was in the step that an engine died of, and had got nothing from it. Alone with the next engine it either gets its next
token, and is like any other from then on, or takes that engine along, too. Meanwhile the others wait. Those that the engine has
already are taken out of it, and go on later from where they were.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from headrace.errors import HeadraceError
from headrace.ports import Deliver, StepNotes
from headrace.types import Delta, Event, GenerateRequest, Report, Resume

Start = Callable[[GenerateRequest, Deliver], Callable[[], None]]
"""Gives a request to the engine; what comes back cancels it."""


class Turns:
    """Hands requests to the engine: at once, as long as there is no suspect.

    `notes` is where it is noted that a suspect is alone. With `resumes` false, as for an engine that can't go on with what it has begun,
    suspects are nothing special. Used on the event loop.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.notes: StepNotes | None = None
        self.resumes = False
        self.running: set[_Run] = set()
        self.held: deque[_Run] = deque()
        self.suspects: deque[_Run] = deque()
        self.lone: _Run | None = None

    def run(self, request: GenerateRequest, deliver: Deliver, *, suspect: bool = False) -> Callable[[], None]:
        """Run a request when it is its turn; what comes back cancels it. `deliver` gets exactly one `Report` or error, last."""
        run = _Run(self, request, deliver)
        if suspect and self.resumes:
            self.suspects.append(run)
            self.next()
        elif self.lone is not None or self.suspects:
            self.held.append(run)
        else:
            run.begin()
        return run.cancel

    def next(self) -> None:
        """Somebody came, went or got on: whose turn is it?"""
        if self.lone is not None:
            return
        if not self.suspects:
            held, self.held = self.held, deque()
            for run in held:
                run.begin()
        elif self.running:
            for run in [*self.running]:
                run.step_aside()
        else:
            self.lone = self.suspects.popleft()
            if self.notes is not None:
                self.notes.alone(self.lone.request.id)
            self.lone.begin()

    def got_on(self, run: _Run) -> None:
        """A suspect is none any more."""
        if self.lone is run:
            self.lone = None
            if self.notes is not None:
                self.notes.alone("")
            self.next()

    def gone(self, run: _Run) -> None:
        """The engine is done with it, for good or for now."""
        self.running.discard(run)
        if self.lone is run:
            self.got_on(run)
        elif self.suspects:
            self.next()


class _Run:
    """One request, whether the engine has it or not."""

    __slots__ = ("_cancel", "_deadline", "_deliver", "_ended", "_leaving", "_said", "_scored", "_turns", "_unwanted", "request")

    def __init__(self, turns: Turns, request: GenerateRequest, deliver: Deliver) -> None:
        self.request = request
        resume = request.resume
        self._turns = turns
        self._deliver = deliver
        self._said: list[list[int]] = [[] for _ in range(request.sampling.n)] if resume is None else [[*said] for said in resume.generated]
        self._ended: set[int] = set() if resume is None else {*resume.ended}
        self._scored = resume is not None and resume.scored
        self._deadline = None if request.timeout is None else asyncio.get_running_loop().time() + request.timeout
        self._cancel: Callable[[], None] | None = None
        self._leaving = False
        """Taken out of the engine, which has not confirmed it yet."""
        self._unwanted = False

    def begin(self) -> None:
        request = self.request
        if request.timeout is not None and self._deadline is not None:
            left = self._deadline - asyncio.get_running_loop().time()
            if left < request.timeout - 0.001:  # it had to wait
                request = msgspec.structs.replace(request, timeout=max(0.001, left))
        if self._ended or self._scored or any(self._said):
            request = msgspec.structs.replace(request, resume=Resume(tuple(map(tuple, self._said)), tuple(self._ended), self._scored))
        self._turns.running.add(self)
        cancel = self._turns.start(request, self._hear)
        if self in self._turns.running:
            self._cancel = cancel

    def step_aside(self) -> None:
        """Leave the engine to a suspect, and come back."""
        if not self._leaving and self._cancel is not None:
            self._leaving = True
            self._cancel()

    def cancel(self) -> None:
        turns = self._turns
        if self._leaving:
            self._unwanted = True
        elif self in turns.running:
            if self._cancel is not None:
                self._cancel()
        else:
            waiting = turns.held if self in turns.held else turns.suspects
            if self in waiting:
                waiting.remove(self)
                said = sum(map(len, self._said))
                # A request that never had the engine has cost nothing.
                self._deliver([Report(len(self.request.prompt) if said else 0, 0, said, 0.0, 0.0, 0.0)])

    def _hear(self, what: Sequence[Event] | HeadraceError) -> None:
        turns = self._turns
        if isinstance(what, HeadraceError):
            self._deliver(what)
            turns.gone(self)
            return
        if turns.resumes:
            self._take_note(what)
        if type(what[-1]) is not Report:
            self._deliver(what)
            turns.got_on(self)
        elif not self._leaving or self._unwanted or len(self._ended) == len(self._said):
            self._deliver(what)
            turns.gone(self)
        else:
            if len(what) > 1:
                self._deliver(what[:-1])
            self._leaving, self._cancel = False, None
            turns.held.append(self)
            turns.gone(self)

    def _take_note(self, events: Sequence[Event]) -> None:
        for event in events:
            if type(event) is Delta:
                self._said[event.choice] += event.tokens
                if event.finish is not None:
                    self._ended.add(event.choice)
            elif type(event) is not Report:
                self._scored = True
