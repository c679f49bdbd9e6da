"""What is known of why workers died: of a death whose every suspect got on later, none of them was the reason.

Where there were such deaths of late, somebody kills workers from outside (an operator, a script, the kernel for want of memory), and may
hit a request while it has a worker to itself more than once. Then it takes more to convict one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

LONE_DEATHS = 2
"""Workers in a row that died while a suspect had them to itself, upon which it is convicted. One may have been killed by somebody else."""
MOST_MORE = 2
"""So many more at most, where deaths of late were nobody's fault."""
REMEMBERED = 60.0
"""Seconds for which such a death counts."""


class Suspected(Protocol):
    """A request that a worker may have died of."""

    deaths: list[Death]
    """Those that it may be the reason for."""


class Death:
    """Of one worker. `suspects` are all that may be the reason."""

    __slots__ = ("_deaths", "_left")

    def __init__(self, deaths: Deaths, suspects: Sequence[Suspected]) -> None:
        self._deaths = deaths
        self._left = len(suspects)
        for suspect in suspects:
            suspect.deaths.append(self)

    def cleared(self) -> None:
        """One of them got on."""
        self._left -= 1
        if not self._left:
            self._deaths.unexplained()


class Deaths:
    """Of the workers of one engine. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._unexplained: deque[float] = deque(maxlen=MOST_MORE)
        """When the latest of these were found out."""

    def died(self, suspects: Sequence[Suspected]) -> None:
        """A worker died, and it may have been for one of these, which had got nothing from it. Where there are none nothing is known: a
        request may kill with a later token, too."""
        if suspects:
            Death(self, suspects)

    def unexplained(self) -> None:
        """A death was nobody's fault."""
        self._unexplained.append(self._clock())

    @property
    def to_convict(self) -> int:
        """Workers in a row that must have died while a suspect had them to itself."""
        return LONE_DEATHS + self._of_late

    @property
    def from_outside(self) -> bool:
        """Whether somebody kills workers again and again. Then to be in the step that one died of says little."""
        return self._of_late == MOST_MORE

    @property
    def _of_late(self) -> int:
        since = self._clock() - REMEMBERED
        return sum(when > since for when in self._unexplained)
