"""Which models are in memory: who is loaded, who is unloaded for whom, and who has to wait. Time and news come in, orders go out.

What is loading, ready or draining holds what it needs of each pool of memory (`ram`, `gpu:0`, …) until it is gone, so that loads at the
same time can't take the same memory twice. Models that are wanted are served in the order in which they were first wanted. For one that
doesn't fit, those that were used least recently are unloaded, but none that is pinned, kept or in use, and none if that wouldn't make
enough room. While the first that waits can't be helped, later ones get free memory only, and nobody's place: so the first is helped as soon
as enough others rest. One that wouldn't fit beside the pinned ones holds up nobody.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

State = Literal["absent", "fetching", "loading", "ready", "draining"]

RETRY = 10.0
"""Seconds after which a model that must always be there is tried again, if it couldn't be loaded."""
LINGERS = 10.0
"""Seconds that a model which has been replaced stays after its last use."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Find out what it needs; answered by `found` or `failed`."""

    name: str


@dataclass(frozen=True, slots=True)
class Load:
    """Answered by `ready` or `failed`."""

    name: str


@dataclass(frozen=True, slots=True)
class Unload:
    """Answered by `gone`, or, if it is `gentle` and somebody has come to use it meanwhile, by `spared`."""

    name: str
    gentle: bool


@dataclass(frozen=True, slots=True)
class Refuse:
    """Those that wait for it wait in vain. `ever`: nothing that others do can help."""

    name: str
    reason: str
    ever: bool = True


Order = Fetch | Load | Unload | Refuse


@dataclass(slots=True)
class Stall:
    """One model's place."""

    name: str
    needs: dict[str, int] | None
    """Bytes of each pool; None where that is to be found out."""
    pinned: bool
    keep_alive: float | None
    state: State = "absent"
    users: set[Hashable] = field(default_factory=set)
    """Who has requests for it, waiting or under way."""
    kept: int = 0
    """How many want it to be loaded and to stay, whether or not it is used."""
    turn: int = 0
    """Of those that wait to be loaded, the smallest is first; 0: it doesn't wait."""
    last_used: float = 0.0
    leaving: bool = False
    """It is to be unloaded as soon as possible, in use or not."""
    replaced: bool = False
    """Another version took over. Requests that had chosen this one before may still come and have it loaded again: not to stay."""
    refused: bool = False
    """Nobody tries again until it is asked for again."""
    retry_at: float = 0.0

    @property
    def wanted(self) -> bool:
        return (bool(self.users) and not self.refused) or self.stays

    @property
    def stays(self) -> bool:
        return self.pinned or self.kept > 0

    @property
    def patience(self) -> float | None:
        """Seconds after its last use when it is unloaded though nobody needs the room; None is never."""
        if not self.replaced:
            return self.keep_alive
        return LINGERS if self.keep_alive is None else min(LINGERS, self.keep_alive)

    @property
    def holds(self) -> Mapping[str, int]:
        """What it takes of each pool now."""
        return self.needs or {} if self.state in ("loading", "ready", "draining") else {}


class Stables:
    """`budget`: bytes of each pool; a pool that isn't named has no end."""

    def __init__(self, budget: Mapping[str, int]) -> None:
        self.budget = dict(budget)
        self._stalls: dict[str, Stall] = {}
        self._turns = itertools.count(1)

    def __getitem__(self, name: str) -> Stall:
        return self._stalls[name]

    def __iter__(self) -> Iterator[Stall]:
        return iter(self._stalls.values())

    def add(self, name: str, needs: Mapping[str, int] | None, *, pinned: bool = False, keep_alive: float | None = None) -> None:
        """A model that may be asked for."""
        self._stalls[name] = Stall(name, None if needs is None else dict(needs), pinned, keep_alive)

    def remove(self, name: str) -> None:
        """Forget a model that is absent."""
        assert self._stalls[name].state == "absent"
        del self._stalls[name]

    # What happens

    def ask(self, name: str, user: Hashable, now: float) -> None:
        """That user has a request for it."""
        stall = self._stalls[name]
        stall.users.add(user)
        stall.refused, stall.last_used = False, now

    def leave(self, name: str, user: Hashable, now: float) -> None:
        """That user has no requests for it any more."""
        stall = self._stalls[name]
        if user in stall.users:
            stall.users.discard(user)
            stall.last_used = now

    def forget(self, user: Hashable, now: float) -> None:
        """The user is gone."""
        for name in self._stalls:
            self.leave(name, user, now)

    def keep(self, name: str) -> None:
        """Have it loaded, and don't unload it until as many `let_go`."""
        stall = self._stalls[name]
        stall.kept += 1
        stall.refused, stall.leaving, stall.replaced, stall.retry_at = False, False, False, 0.0

    def let_go(self, name: str, now: float) -> None:
        stall = self._stalls[name]
        stall.kept -= 1
        stall.last_used = now

    def unload(self, name: str) -> None:
        """Once what runs is over. It is loaded again when it is asked for again."""
        if self._stalls[name].state == "ready":
            self._stalls[name].leaving = True

    def replace(self, name: str) -> None:
        """Likewise; and from now on it is only there while it is used, until somebody wants to `keep` it."""
        self._stalls[name].replaced = True
        self.unload(name)

    def found(self, name: str, needs: Mapping[str, int]) -> None:
        stall = self._stalls[name]
        assert stall.state == "fetching"
        stall.state, stall.needs = "absent", dict(needs)

    def ready(self, name: str, now: float) -> None:
        stall = self._stalls[name]
        assert stall.state == "loading"
        stall.state, stall.last_used, stall.turn = "ready", now, 0

    def failed(self, name: str, now: float) -> None:
        """It could not be fetched or loaded."""
        stall = self._stalls[name]
        assert stall.state in ("fetching", "loading")
        stall.state, stall.refused, stall.turn, stall.retry_at = "absent", True, 0, now + RETRY

    def gone(self, name: str) -> None:
        """It is out of memory. Who has requests that wait for it asks again."""
        stall = self._stalls[name]
        assert stall.state == "draining"
        stall.state, stall.leaving = "absent", False
        stall.users.clear()

    def spared(self, name: str, now: float) -> None:
        """It was in use after all."""
        stall = self._stalls[name]
        assert stall.state == "draining"
        stall.state, stall.last_used = "ready", now

    # What follows

    def orders(self, now: float) -> list[Order]:
        """What is to be done now; it counts as begun."""
        orders: list[Order] = [*self._leaves(now)]
        waiting = [
            stall for stall in self._stalls.values() if stall.state == "absent" and stall.wanted and now >= stall.retry_at * stall.stays
        ]
        for stall in self._stalls.values():
            if stall not in waiting:
                stall.turn = 0
        for stall in waiting:
            stall.turn = stall.turn or next(self._turns)
        first_waits = False
        for stall in sorted(waiting, key=lambda stall: (not stall.stays, stall.turn)):
            if stall.needs is None:
                stall.state = "fetching"
                orders.append(Fetch(stall.name))
            elif too_much := self._too_much(stall):
                stall.refused, stall.turn, stall.retry_at = True, 0, now + RETRY
                orders.append(Refuse(stall.name, too_much))
            elif not self._lacks(stall, self.held()):
                stall.state = "loading"
                orders.append(Load(stall.name))
            elif not first_waits:
                victims = self._victims(stall)
                for victim in victims:
                    victim.state = "draining"
                    orders.append(Unload(victim.name, gentle=True))
                first_waits = bool(victims) or not self._lacks(stall, self._held_by(lambda other: other.stays))
        return orders

    def next_look(self, now: float) -> float | None:
        """Seconds until time alone changes something."""
        moments = [
            stall.last_used + stall.patience
            for stall in self._stalls.values()
            if stall.patience is not None and stall.state == "ready" and not stall.stays and not stall.users
        ]
        moments += [stall.retry_at for stall in self._stalls.values() if stall.stays and stall.state == "absent"]
        return max(0.0, min(moments) - now) if moments else None

    def held(self) -> dict[str, int]:
        """Bytes of each pool that are taken or promised."""
        return self._held_by(lambda stall: True)

    def why_not(self, name: str) -> str:
        """Why a model that is wanted isn't being loaded, for a person."""
        stall = self._stalls[name]
        if stall.needs is None:
            return "it is being fetched"
        parts = []
        for pool, lack in self._lacks(stall, self.held()).items():
            others = ", ".join(
                f"{other.name} {gib(other.holds[pool])}{' (pinned)' if other.pinned else ' (in use)' if other.users or other.kept else ''}"
                for other in self._stalls.values()
                if other.holds.get(pool)
            )
            parts.append(
                f"it needs {gib(stall.needs[pool])} of {pool}, {gib(lack)} more than is left of {gib(self.budget[pool])} beside {others}"
            )
        return "; ".join(parts)

    def _leaves(self, now: float) -> Iterable[Order]:
        for stall in self._stalls.values():
            if stall.state != "ready" or stall.kept:
                continue
            idle = stall.patience is not None and now - stall.last_used >= stall.patience and not stall.users and not stall.pinned
            if stall.leaving or idle:
                gentle = not stall.leaving
                stall.state, stall.leaving = "draining", False
                yield Unload(stall.name, gentle)

    def _too_much(self, stall: Stall) -> str:
        """Why it can't be loaded even alone, if so."""
        lacks = self._lacks(stall, {})
        assert stall.needs is not None
        return "; ".join(f"it needs {gib(stall.needs[pool])} of {pool}, and all models may take {gib(self.budget[pool])}" for pool in lacks)

    def _victims(self, stall: Stall) -> list[Stall]:
        """Those to unload for it, the least recently used first; none if that isn't enough, or if enough are leaving already."""
        held = self._held_by(lambda other: other.state != "draining")
        victims = []
        idle = [each for each in self._stalls.values() if each.state == "ready" and not each.stays and not each.users]
        for each in sorted(idle, key=lambda each: each.last_used):
            lacks = self._lacks(stall, held)
            if not lacks:
                break
            if any(each.holds.get(pool) for pool in lacks):
                victims.append(each)
                for pool, size in each.holds.items():
                    held[pool] -= size
        return [] if self._lacks(stall, held) else victims

    def _lacks(self, stall: Stall, held: Mapping[str, int]) -> dict[str, int]:
        """By pool, what is missing for it."""
        missing = {}
        for pool, size in (stall.needs or {}).items():
            end = self.budget.get(pool)
            if end is not None and held.get(pool, 0) + size > end:
                missing[pool] = held.get(pool, 0) + size - end
        return missing

    def _held_by(self, counts: Callable[[Stall], bool]) -> dict[str, int]:
        held: dict[str, int] = {}
        for stall in self._stalls.values():
            if counts(stall):
                for pool, size in stall.holds.items():
                    held[pool] = held.get(pool, 0) + size
        return held


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB"
