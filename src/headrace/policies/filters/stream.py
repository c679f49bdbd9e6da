"""Masks matches in a text that arrives in pieces, so that the pieces don't matter.

A character is masked when it belongs to any match of any detector; matches that overlap are masked as one. So the result
does not depend on an order of detectors or on which of two overlapping matches is seen first, and it can be
told as soon as no match under way reaches back to the character.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from headrace.policies.filters.automaton import Hit, Machine, Position
from headrace.policies.filters.joint import Joint, JointState

Action = Literal["mask", "block", "refuse", "strip"]
Decide = Callable[[str, Action], None]
"""Told the kind and the action of each decision, once."""


PIECE = 512
"""Longer texts are taken in pieces of so many characters, so that few matches are in hand at a time."""


@dataclass(frozen=True, slots=True)
class Detector:
    """What a match is called and what becomes of it: `mask`, or else the text ends before it.

    `check` decides over the matched text, such as by a checksum.
    """

    kind: str
    action: Action
    check: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything that texts are filtered with: machines, and for each the detectors that its hits name.

    The detectors of one machine have one action.
    """

    machines: tuple[tuple[Machine, tuple[Detector, ...]], ...]
    mask: str
    glance: Callable[[str], bool] | None = None
    """Whether there may be a match in a whole text; a quick look that spares nearly all texts the machines."""
    joint: Joint = field(init=False, compare=False)
    """All machines together."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "joint", Joint([machine for machine, _ in self.machines]))


class Run:
    """Matches that overlap, masked as one and counted under the first of them."""

    __slots__ = ("action", "end", "first", "kind", "shown", "start")

    def __init__(self, start: int, end: int, order: tuple[int, int], kind: str, action: Action) -> None:
        self.start = start
        self.end = end
        self.first = (start, end, order)
        self.kind = kind
        self.action = action
        self.shown = False

    def join(self, other: Run) -> None:
        self.start = min(self.start, other.start)
        self.end = max(self.end, other.end)
        self.shown = self.shown or other.shown
        if other.first < self.first:
            self.first, self.kind = other.first, other.kind


class Stream:
    """One text on its way. Positions are characters since its beginning."""

    __slots__ = ("_decide", "_joint", "_machines", "_mask", "_pending", "_runs", "_state", "_stop", "base", "blocked", "masked", "seen")

    def __init__(self, rules: Rules, decide: Decide) -> None:
        self._machines = rules.machines
        self._mask = rules.mask
        self._decide = decide
        self._joint = rules.joint
        self._state: JointState = rules.joint.start
        self._pending = ""
        self._runs: list[Run] = []
        self._stop: Run | None = None
        self.base = 0
        """Up to here all is decided and sent."""
        self.seen = 0
        self.blocked = False
        """A match that is not just masked was found; nothing comes any more."""
        self.masked: list[tuple[int, int]] | None = None
        """If a list, the matches up to `base` are appended to it."""

    @property
    def positions(self) -> tuple[Position, ...]:
        return self._state.positions

    def feed(self, text: str) -> str:
        """Take the next piece; what can be sent of all pieces so far, matches masked."""
        if len(text) > PIECE:
            return "".join([self.feed(text[at : at + PIECE]) for at in range(0, len(text), PIECE) if not self.blocked])
        state = self._state
        for character in text:
            state = state[character]
            if state.hits:
                return self._feed_with_hits(text)
        self._state = state
        hold = state.hold
        self.seen += len(text)
        if not hold and not self._pending and not self._runs:
            self.base = self.seen
            return text
        self._pending += text
        return self._send(self.seen - hold)

    def _feed_with_hits(self, text: str) -> str:
        """As `feed`, one machine after the other: what they find counts in their order."""
        self._pending += text
        begin = self.seen
        self.seen += len(text)
        positions = list(self._state.positions)
        for index, (machine, _) in enumerate(self._machines):
            position, classes = positions[index], machine.classes
            for place, character in enumerate(text, begin + 1):
                position = position[classes[character]]
                if position.hits:
                    self._note(index, position.hits, place)
            positions[index] = position
        state = self._state = self._joint.state(tuple(positions))
        return self._send(self.seen - state.hold)

    def finish(self) -> str:
        """The rest, now that the text has ended."""
        for index, (machine, _) in enumerate(self._machines):
            hits = machine.end(self._state.positions[index])
            if hits:
                self._note(index, hits, self.seen)
        return self._send(self.seen)

    def would_match(self, positions: Sequence[Position], text: str) -> bool:
        """Whether a match would end in `text`, had it come at those `positions`; checks aside."""
        for (machine, _), position in zip(self._machines, positions, strict=True):
            classes = machine.classes
            for character in text:
                position = position[classes[character]]
                if position.hits:
                    return True
        return False

    def _note(self, index: int, hits: tuple[Hit, ...], place: int) -> None:
        detectors = self._machines[index][1]
        found = -1
        for which, began, ended in hits:
            if ended == found:
                continue  # an older match has this end and covers all of this one
            start, end = place - began, place - ended
            detector = detectors[which]
            if detector.action != "mask" or not self._covered(start, end):
                if detector.check is not None and not detector.check(self._pending[start - self.base : end - self.base]):
                    continue
                self._take(Run(start, end, (index, which), detector.kind, detector.action))
            found = ended
            if not ended:
                break  # they are sorted so that all further ones have this end

    def _covered(self, start: int, end: int) -> bool:
        """Whether masking a match would change nothing, because it is inside of one that began before it."""
        last = self._runs[-1] if self._runs else None
        return last is not None and last.start < start and end <= last.end

    def _take(self, run: Run) -> None:
        if run.action == "mask":
            self._add(run)
        elif self._stop is None or run.first < self._stop.first:
            self._stop = run

    def _add(self, run: Run) -> None:
        last = self._runs[-1] if self._runs else None
        if last is None or last.end <= run.start:
            self._runs.append(run)
            return
        if last.start <= run.start:
            last.join(run)
            return
        apart: list[Run] = []
        for other in self._runs:
            if other.start < run.end and run.start < other.end:
                run.join(other)
            else:
                apart.append(other)
        # Few at a time: only those that what is under way still reaches.
        apart.append(run)
        apart.sort(key=lambda run: run.start)
        self._runs = apart

    def _send(self, front: int) -> str:
        """What stands before `front`, where all is decided."""
        if self.blocked:
            return ""
        stop = self._stop
        if stop is not None and stop.start <= front:
            sent = self._render(stop.start)
            for run in self._runs:
                if run.shown:
                    self._decide(run.kind, run.action)
            self._decide(stop.kind, stop.action)
            self.blocked = True
            self._pending, self._runs = "", []
            return sent
        return self._render(front)

    def _render(self, front: int) -> str:
        pending, base = self._pending, self.base
        self._pending = pending[front - base :]
        self.base = front
        if not self._runs:
            return pending[: front - base]
        parts: list[str] = []
        at = base
        done = 0
        for run in self._runs:
            if run.start >= front:
                break
            parts.append(pending[at - base : max(run.start - base, 0)])
            if not run.shown:
                run.shown = True
                parts.append(self._mask)
            at = max(at, min(run.end, front))
            if self.masked is not None:
                self.masked.append((run.start, min(run.end, front)))
            if run.end <= front:
                self._decide(run.kind, run.action)
                done += 1
        del self._runs[:done]
        parts.append(pending[at - base : front - base])
        return "".join(parts)
