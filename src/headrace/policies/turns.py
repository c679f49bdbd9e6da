"""An API process's turns at making answers that others may be asked for, too (`turn_table` says whose turn it is).

Nothing depends on the table's being there: where no word comes, each process makes its own answer.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Literal

from headrace.policies.turn_table import TurnMove, TurnWord
from headrace.ports import Publishes

WORD = 1.0
"""Seconds to wait for the table's word, and between two questions of who waits for another process."""
STANDS = 1.0
"""Seconds that others wait for an answer that stands still: because nobody reads it, or because it isn't written."""

Tell = Callable[[list[tuple[bytes, int, TurnMove]]], None]
"""Brings moves to the table, in their order, and waits for nothing. Its words come by `Turns.hear`."""


class Turn:
    """One wish to make an answer. `came` is called when it is to be made here, or can be read; `stands_still` says whether what it has
    become makes no progress."""

    __slots__ = ("_came", "_move", "_silent", "_tell", "_timer", "keeping", "key", "number", "stands_still", "stood_since", "wanted")

    def __init__(
        self,
        key: bytes,
        number: int,
        tell: Callable[[Turn, TurnMove], None],
        came: Callable[[Literal["make", "look"]], None],
        stands_still: Callable[[], bool],
    ) -> None:
        self.key = key
        self.number = number
        self.stands_still = stands_still
        self.stood_since: float | None = None
        self.wanted = False
        """Others have waited for it."""
        self.keeping = False
        """The answer is made, and on its way to where others can read it."""
        self._tell = tell
        self._came = came
        self._move: TurnMove = "ask"
        self._silent = True
        self._timer: asyncio.TimerHandle | None = None
        self._ask()

    @property
    def asked_again(self) -> bool:
        return self._move == "ask again"

    def ask_again(self) -> None:
        """It was looked for, and not found."""
        self._move = "ask again"
        self._ask()

    def say(self, word: Literal["make", "wait", "look"]) -> None:
        if word == "wait":
            self._silent = False
        elif self._timer is not None:
            self.stop()
            self._came(word)

    def stop(self) -> None:
        """Wait no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _ask(self) -> None:
        self._silent = True
        self._tell(self, self._move)
        self._timer = asyncio.get_running_loop().call_later(WORD, self._no_word)

    def _no_word(self) -> None:
        if self._silent:
            self.say("make")
        else:
            self._ask()


class Turns:
    """`answers`: where what is made is kept, for all processes to read."""

    def __init__(self, tell: Tell, answers: Publishes) -> None:
        self._tell = tell
        self._answers = answers
        self._turns: dict[int, Turn] = {}
        self._keeping: dict[bytes, Turn] = {}
        self._numbers = itertools.count(1)
        self._moves: list[tuple[bytes, int, TurnMove]] = []
        answers.told = self._kept

    @property
    def useful(self) -> bool:
        """Whether an answer that is made here can reach others at all, just now."""
        return self._answers.shared

    def begin(self, key: bytes, came: Callable[[Literal["make", "look"]], None], stands_still: Callable[[], bool]) -> Turn:
        """Ask for a turn."""
        number = next(self._numbers)
        turn = self._turns[number] = Turn(key, number, self._told, came, stands_still)
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
            turn.stop()
            self._told(turn, how)

    def forget(self, turn: Turn) -> None:
        """It found what others have made: the table knows nothing of it any more."""
        self._turns.pop(turn.number, None)

    def hear(self, key: bytes, number: int, word: TurnWord) -> None:
        """What the table says."""
        turn = self._turns.get(number)
        if turn is None:
            if word in ("make", "wanted"):  # it was given what nobody here waits for any more
                self._add(key, number, "left")
        elif word == "wanted":
            self._wanted(turn)
        else:
            turn.say(word)

    def _wanted(self, turn: Turn) -> None:
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
        self._told(turn, "go on")

    def _kept(self, keys: Sequence[bytes], readable: bool) -> None:
        """Of some answers it is known now whether others can read them."""
        turns = [turn for key in dict.fromkeys(keys) if (turn := self._keeping.get(key)) is not None]
        self._over(turns, "kept" if readable else "apart")

    def _over(self, turns: list[Turn], how: Literal["kept", "apart"]) -> None:
        for turn in turns:
            self._turns.pop(turn.number, None)
            if self._keeping.get(turn.key) is turn:
                del self._keeping[turn.key]
            self._told(turn, how)

    def _told(self, turn: Turn, move: TurnMove) -> None:
        self._add(turn.key, turn.number, move)

    def _add(self, key: bytes, number: int, move: TurnMove) -> None:
        """Moves of the same moment go in one message."""
        if not self._moves:
            asyncio.get_running_loop().call_soon(self._flush)
        self._moves.append((key, number, move))

    def _flush(self) -> None:
        moves, self._moves = self._moves, []
        self._tell(moves)
