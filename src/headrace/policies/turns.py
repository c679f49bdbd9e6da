"""An API process's turns at making answers that others may be asked for, too (`turn_table` says whose turn it is).

Nothing depends on the table's being there: where no word comes, each process makes its own answer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from headrace.policies.turn_table import TurnEnd, TurnWord
from headrace.ports import Publishes

WORD = 1.0
"""Seconds to wait for the table's word, and between two questions of who waits for another process."""
STANDS = 1.0
"""Seconds that others wait for an answer that stands still: because nobody reads it, or because it isn't written."""


class TurnPlace(Protocol):
    """Where the table is: the supervisor. Nothing here waits."""

    def ask_turn(self, key: bytes, number: int, looked: bool) -> None:
        """The word on it comes by `Turns.hear`."""
        ...

    def turn_goes_on(self, key: bytes, number: int) -> None:
        """It is being made."""
        ...

    def end_turns(self, ends: Sequence[tuple[bytes, int, TurnEnd]]) -> None:
        """They are over."""
        ...


class Turn:
    """One wish to make an answer. `stands_still` says whether what it has become makes no progress."""

    __slots__ = ("_place", "_words", "keeping", "key", "number", "stands_still", "stood_since", "wanted")

    def __init__(self, place: TurnPlace, key: bytes, number: int, stands_still: Callable[[], bool]) -> None:
        self.key = key
        self.number = number
        self.stands_still = stands_still
        self.stood_since: float | None = None
        self.wanted = False
        """Others have waited for it."""
        self.keeping = False
        """The answer is made, and on its way to where others can read it."""
        self._place = place
        self._words: asyncio.Queue[TurnWord] = asyncio.Queue()

    def say(self, word: TurnWord) -> None:
        self._words.put_nowait(word)

    async def come(self, *, looked: bool) -> Literal["make", "look"]:
        """Wait until the answer is to be made here, or can be read. `looked`: since the last word it was looked for, and not found."""
        self._place.ask_turn(self.key, self.number, looked)
        silent = True
        while True:
            try:
                async with asyncio.timeout(WORD):
                    word = await self._words.get()
            except TimeoutError:
                if silent:
                    return "make"
                self._place.ask_turn(self.key, self.number, looked)
                silent = True
                continue
            if word == "make" or word == "look":
                return word
            silent = False


class Turns:
    """`answers`: where what is made is kept, for all processes to read."""

    def __init__(self, place: TurnPlace, answers: Publishes) -> None:
        self._place = place
        self._answers = answers
        self._turns: dict[int, Turn] = {}
        self._keeping: dict[bytes, Turn] = {}
        self._numbers = itertools.count(1)
        answers.told = self._kept

    @property
    def useful(self) -> bool:
        """Whether an answer that is made here can reach others at all, just now."""
        return self._answers.shared

    def begin(self, key: bytes, stands_still: Callable[[], bool]) -> Turn:
        number = next(self._numbers)
        turn = self._turns[number] = Turn(self._place, key, number, stands_still)
        return turn

    def keep(self, turn: Turn) -> None:
        """The answer is complete, and about to be kept."""
        if turn.number in self._turns:
            before = self._keeping.get(turn.key)
            if before is not None:
                self._over([before], "apart")
            turn.keeping = True
            if turn.wanted:
                self._answers.hurry()
            self._keeping[turn.key] = turn

    def end(self, turn: Turn, how: Literal["left", "apart"]) -> None:
        """Idempotent. Of one that is `keeping` the end is told when it is kept."""
        if not turn.keeping and self._turns.pop(turn.number, None) is not None:
            self._place.end_turns([(turn.key, turn.number, how)])

    def forget(self, turn: Turn) -> None:
        """It found what others have made: the table knows nothing of it any more."""
        self._turns.pop(turn.number, None)

    def hear(self, key: bytes, number: int, word: TurnWord) -> None:
        """What the table says."""
        turn = self._turns.get(number)
        if word == "wanted":
            self._wanted(key, number, turn)
        elif turn is not None:
            turn.say(word)
        elif word == "make":
            # It has been given up meanwhile, and the table will hear of that; or it has heard, and has forgotten.
            self._place.end_turns([(key, number, "left")])

    def _wanted(self, key: bytes, number: int, turn: Turn | None) -> None:
        if turn is None:
            self._place.end_turns([(key, number, "left")])
            return
        turn.wanted = True
        if turn.keeping:
            self._answers.hurry()
        if not turn.keeping and not turn.stands_still():
            turn.stood_since = None
        elif turn.stood_since is None:
            turn.stood_since = time.monotonic()
        elif time.monotonic() - turn.stood_since > STANDS:
            self._over([turn], "apart")
            return
        self._place.turn_goes_on(key, number)

    def _kept(self, keys: Sequence[bytes], readable: bool) -> None:
        """Of some answers it is known now whether others can read them."""
        turns = [turn for key in keys if (turn := self._keeping.get(key)) is not None]
        self._over(turns, "kept" if readable else "apart")

    def _over(self, turns: list[Turn], how: TurnEnd) -> None:
        for turn in turns:
            del self._turns[turn.number]
            if self._keeping.get(turn.key) is turn:
                del self._keeping[turn.key]
        if turns:
            self._place.end_turns([(turn.key, turn.number, how) for turn in turns])
