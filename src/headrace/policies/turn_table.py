"""Who makes an answer that several API processes are asked for at the same time: one has the turn, the others wait for what comes of it.

The table is in the supervisor. It knows names of answers only, never what they say.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

TurnWord = Literal["make", "wait", "look", "wanted"]
"""`make`: it is your turn, or there is nothing to wait for. `wait`: another process is making it; ask again now and then. `look`: it is
kept, and can be read. `wanted`, to who has the turn: somebody waits; say how it stands."""
TurnMove = Literal["ask", "ask again", "go on", "kept", "left", "apart"]
"""`ask`: a process has looked for an answer and would make it, or still waits for it. `ask again`: it has also looked when it was told to.
`go on`: what a maker says when it is `wanted`, and has no end to tell. The others are ends.

`kept`: everybody can read the answer now. `left`: nobody wants it here any more; who waits may go on. `apart`: this answer is not for
others, or not soon; each is to make its own."""

LATELY = 2.0
"""Seconds in which an answer that was kept may have been missed by who looked just before."""
SILENT = 3.0
"""Seconds after which a process that doesn't say how it stands has lost its turn."""

_Claimant = tuple[int, int]


@dataclass(slots=True)
class _Turn:
    maker: _Claimant
    waiting: dict[_Claimant, None] = field(default_factory=dict)
    """In the order they came."""
    asked_at: float | None = None
    """Since when the maker owes word."""


class TurnTable:
    """`say` is called with a process's id, an answer's name, the number that this process has given its question, and the word on it.

    `clock` is in seconds and never goes back.
    """

    def __init__(self, say: Callable[[int, bytes, int, TurnWord], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._turns: dict[bytes, _Turn] = {}
        self._kept: dict[bytes, float] = {}
        """When answers were kept, of late; the oldest first."""

    def __len__(self) -> int:
        """Answers that are being made, or are about to be kept."""
        return len(self._turns)

    def hear(self, process: int, key: bytes, number: int, move: TurnMove) -> None:
        """What a process says. What isn't known any more is no error."""
        if move == "ask" or move == "ask again":
            self._ask(process, key, number, looked=move == "ask again")
            return
        turn = self._turns.get(key)
        if move != "go on":
            self._end(process, key, number, move)
        elif turn is not None and turn.maker == (process, number):
            turn.asked_at = None

    def lapse(self, process: int) -> None:
        """A process is gone."""
        for key, turn in [*self._turns.items()]:
            for claimant in [each for each in turn.waiting if each[0] == process]:
                del turn.waiting[claimant]
            if turn.maker[0] == process:
                self._pass_on(key, turn)

    def _ask(self, process: int, key: bytes, number: int, *, looked: bool) -> None:
        claimant, now = (process, number), self._clock()
        turn = self._turns.get(key)
        if turn is None:
            kept_at = self._kept.get(key)
            if not looked and kept_at is not None and now - kept_at < LATELY:
                self._say(process, key, number, "look")
            else:
                self._turns[key] = _Turn(claimant)
                self._say(process, key, number, "make")
        elif turn.maker == claimant:
            self._say(process, key, number, "make")
        elif turn.asked_at is not None and now - turn.asked_at > SILENT:
            turn.waiting.pop(claimant, None)
            self._give(key, turn, claimant)
        else:
            turn.waiting[claimant] = None
            turn.asked_at = now if turn.asked_at is None else turn.asked_at
            self._say(process, key, number, "wait")
            self._say(turn.maker[0], key, turn.maker[1], "wanted")

    def _end(self, process: int, key: bytes, number: int, how: Literal["kept", "left", "apart"]) -> None:
        """A turn is over, or one who waited (`left`) waits no longer."""
        if how == "kept":
            self._note(key)
        turn = self._turns.get(key)
        if turn is None:
            return
        turn.waiting.pop((process, number), None)
        ours = turn.maker == (process, number)
        if how == "kept" or (ours and how == "apart"):
            waiting, turn.waiting = turn.waiting, {}
            for other, its_number in waiting:
                self._say(other, key, its_number, "look" if how == "kept" else "make")
        if ours:
            self._pass_on(key, turn)

    def _pass_on(self, key: bytes, turn: _Turn) -> None:
        first = next(iter(turn.waiting), None)
        if first is None:
            del self._turns[key]
        else:
            del turn.waiting[first]
            self._give(key, turn, first)

    def _give(self, key: bytes, turn: _Turn, claimant: _Claimant) -> None:
        turn.maker, turn.asked_at = claimant, None
        self._say(claimant[0], key, claimant[1], "make")

    def _note(self, key: bytes) -> None:
        now = self._clock()
        self._kept.pop(key, None)
        self._kept[key] = now
        while now - self._kept[oldest := next(iter(self._kept))] >= LATELY:
            del self._kept[oldest]
