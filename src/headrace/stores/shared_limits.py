"""One API process's hand in the limits, wherever they are kept: asks together, remembers how subjects stand, and goes on alone
while the place is away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import structlog

from headrace.claims import (
    CORRECTED,
    LEASE_SECONDS,
    Ask,
    Charge,
    Claim,
    Extend,
    Extended,
    Gone,
    Refused,
    Renew,
    Reply,
    Room,
    Settle,
    Settled,
    Take,
    Taken,
    Unseeded,
)
from headrace.errors import StoreUnavailable
from headrace.logs import REQUEST_ID
from headrace.stores.limits_apart import LimitsApart

KNOWN = 10_000
"""Subjects whose last known state a process remembers."""
FIRST_PROBE, LAST_PROBE = 0.1, 1.0
"""Seconds between attempts to reach a place that is away."""
MOST_AT_ONCE = 256
"""Asks in one exchange."""

Spent = Callable[[Claim, float], Awaitable[int]]
"""What the ledger says that a claim's subject has used since then (Unix time). Raises `StoreUnavailable`."""
Answered = Callable[[Reply], None]


class LimitPlace(Protocol):
    """Where limits are kept."""

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to each, all done in order and at once. Raises `StoreUnavailable`; it isn't known then what was done."""
        ...

    async def reconnect(self) -> None:
        """Make sure that it can be reached. May take a second. Raises `StoreUnavailable`."""
        ...

    async def tell(self, asks: Sequence[Ask]) -> None:
        """As `exchange`, where nobody waits for the replies. May take a second."""
        ...

    async def close(self) -> None: ...


class Kept(Protocol):
    """What outlives this process: the asks that the place is still to hear of. Raises `OSError`."""

    def add(self, ask: Ask) -> None: ...

    def clear(self) -> None:
        """The place has heard all of them."""
        ...


async def nothing_spent(claim: Claim, since: float) -> int:
    """For a server without a ledger: budgets begin anew with each start."""
    return 0


class _Running:
    """A request that has been admitted, or may have been."""

    __slots__ = ("apart", "life", "sure", "take")

    def __init__(self, take: Take) -> None:
        self.take = take
        self.apart = False
        """Its lease is here, not at the place."""
        self.sure = True
        """False where the place may have admitted it too, and its answer was lost."""
        self.life = ""
        """The place's, when it admitted it."""


class SharedLimits:
    """`ports.Limits`. `processes`: how many share the limits, and so the size of a share while the place is away. `kept`: has what the
    place must hear of when it is back, should this process be dead by then. `owner`: the name under which this process writes bills."""

    def __init__(
        self, place: LimitPlace, *, spent: Spent = nothing_spent, processes: int = 1, kept: Kept | None = None, owner: str = ""
    ) -> None:
        self._place = place
        self._owner = owner
        self._kept = kept
        self._spent = spent
        self._known: dict[str, tuple[Room, float]] = {}
        self._running: dict[str, _Running] = {}
        self._before: dict[str, tuple[Room, float]] = {}
        """What was known before the latest absence, of subjects that nothing has been heard of since."""
        self._apart = LimitsApart(processes, self._last_heard)
        self._guessed: dict[str, tuple[tuple[Claim, ...], int]] = {}
        """Requests that were settled with the most they can have used."""
        self._final: dict[str, int] = {}
        """What requests used that are still to be settled."""
        self.budget_seen: Callable[[Claim, Room], None] | None = None
        """Called with how a claim with a budget stands, whenever that is heard."""
        self._outbox: list[tuple[Ask, Answered]] = []
        self._owed: dict[str, Ask] = {}
        """What the place must hear of when it is back, by id; saying it twice does no harm."""
        self._flight: asyncio.Task[None] | None = None
        self._return: asyncio.Task[None] | None = None
        self._renewal: asyncio.Task[None] | None = None
        self._log = structlog.get_logger("headrace.limits")

    @property
    def away(self) -> bool:
        """The place can't be reached; limits go on from this process's share of what was last known."""
        return self._return is not None

    # What the journey asks

    def peek(self, claims: Sequence[Claim]) -> tuple[Refused | None, tuple[Room, ...]]:
        """Whether a request would certainly be refused for its rate of requests. Asks nobody: what is known
        here can only have shrunk since, but for what has refilled."""
        now = time.monotonic()
        rooms = tuple(self._room(claim, now) for claim in claims)
        refused = None
        for which, (claim, room) in enumerate(zip(claims, rooms, strict=True)):
            if claim.requests is not None and room.requests < 1:
                wait = (1 - room.requests) * claim.window / claim.requests
                if refused is None or (refused.wait is not None and wait > refused.wait):
                    refused = Refused(which, "requests", wait, False, rooms)
        return refused, rooms

    async def take(self, take: Take) -> Taken | Refused:
        """Admit a request. Raises `StoreUnavailable` where a budget has to be asked of the ledger, and that is away."""
        take = Take(take.id, take.claims, take.prompt, take.output, take.least, take.requests, take.seeds, self._owner)
        running = self._running[take.id] = _Running(take)
        try:
            reply = await self._ask(take)
            if isinstance(reply, Unseeded):
                reply = await self._ask(await self._seeded(take, reply))
        except BaseException:
            # Nobody waits for the answer any more; what was taken is given back when it comes.
            self._settle(take.id, 0)
            raise
        if isinstance(reply, Taken):
            running.life = reply.life
            if self._renewal is None:
                self._renewal = asyncio.create_task(self._renew(), name="limits renewal")
            return reply
        if running.sure:
            self._running.pop(take.id, None)
        else:
            self._settle(take.id, 0)
        if not isinstance(reply, Refused):
            raise StoreUnavailable("It is not known what this caller has spent.", retry_after=1)
        return reply

    def extend(self, id: str, tokens: int, told: Callable[[Extended], None]) -> None:
        """Lease more output; `told` hears what was granted. Never waits."""

        def answered(reply: Reply) -> None:
            told(reply if isinstance(reply, Extended) else Extended(0))

        running = self._running.get(id)
        self._send(Extend(id, tokens, "" if running is None else running.life), answered)

    async def settle(self, id: str, used: int, *, guessed: bool = False, wait: bool = True) -> tuple[Room, ...] | None:
        """The request is over. It is sent before the first wait, so that a cancellation can't lose it; how its claims stand then."""
        final = self._final.pop(id, None)
        if final is not None:
            used, guessed = final, False
        running = self._running.get(id)
        if guessed and running is not None:
            self._guessed[id] = (running.take.claims, used)
            if len(self._guessed) > KNOWN:
                del self._guessed[next(iter(self._guessed))]
        done = self._settle(id, used, guessed=guessed)
        return await done if done is not None and wait else None

    async def charge(self, id: str, claims: tuple[Claim, ...], requests: int) -> tuple[Room, ...] | None:
        """Count so many requests that come to nothing, without a lease; how the claims stand then, where that is known."""
        if not self.away and not all(self._budget_known(claim) for claim in claims):
            # A charge can't say what was spent where the place doesn't know it. A lease of nothing has it asked for.
            with contextlib.suppress(StoreUnavailable):
                if isinstance(await self.take(Take(f"{id}:look", claims, 0, 0, 0, 0)), Taken):
                    await self.settle(f"{id}:look", 0, wait=False)
        charge = Charge(id, claims, requests, 0)
        reply = await self._ask(charge)
        if not isinstance(reply, Settled) or reply.rooms is None:
            if self.away:
                self._apart.answer(charge)
            return None
        if not all(self._budget_known(claim) for claim in claims):
            return None
        rooms = tuple(self._as_spent(claim, room) for claim, room in zip(claims, reply.rooms, strict=True))
        self._learn(claims, rooms)
        return rooms

    def _budget_known(self, claim: Claim) -> bool:
        return claim.budget is None or claim.subject in self._known

    def _as_spent(self, claim: Claim, room: Room) -> Room:
        """With what was last heard of its budget."""
        if claim.budget is None:
            return room
        known, _ = self._known[claim.subject]
        return Room(room.requests, room.tokens, known.spent, known.held, room.running)

    def correct(self, id: str, used: int) -> None:
        """What the ledger says that a request really used, whether it has been settled with a guess or is about to be settled; others
        are ignored. Never waits."""
        if id in self._running:
            self._final[id] = used
            return
        claims, guess = self._guessed.pop(id, ((), used))
        if used != guess:
            self._send(Charge(id + CORRECTED, claims, 0, used - guess), _ignore)

    async def close(self) -> None:
        """Send what is left, if the place is there. Idempotent."""
        for task in (self._renewal, self._return):
            if task is not None:
                task.cancel()
        if self._flight is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._flight), 1)
        await self._place.close()

    # Asking

    async def _seeded(self, take: Take, unseeded: Unseeded) -> Take:
        seeds = [
            None if since is None else await self._spent(claim, since) for claim, since in zip(take.claims, unseeded.since, strict=True)
        ]
        return Take(take.id, take.claims, take.prompt, take.output, take.least, take.requests, tuple(seeds), take.owner)

    def _settle(self, id: str, used: int, *, guessed: bool = False) -> asyncio.Future[tuple[Room, ...] | None] | None:
        running = self._running.pop(id, None)
        if running is None:
            return None
        done: asyncio.Future[tuple[Room, ...] | None] = asyncio.get_running_loop().create_future()

        def answered(reply: Reply) -> None:
            if not done.done():
                done.set_result(reply.rooms if isinstance(reply, Settled) else None)

        take = running.take
        if running.apart:
            reply = self._apart.answer(Settle(id, used))
            self._send(Charge(id, take.claims, take.requests, used, time.time()), _ignore)
            answered(reply)
        elif not running.sure:
            # It may or may not have been admitted there.
            self._send(Charge(id, take.claims, 0, used, time.time()), answered)
        else:
            self._send(Settle(id, used, take.claims, running.life, time.time(), guessed), answered, take.claims)
        return done

    async def _ask(self, ask: Ask) -> Reply:
        done: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()

        def answered(reply: Reply) -> None:
            if not done.done():
                done.set_result(reply)

        self._send(ask, answered)
        return await done

    def _send(self, ask: Ask, answered: Answered, claims: tuple[Claim, ...] = ()) -> None:
        if self.away or (isinstance(ask, Extend) and (running := self._running.get(ask.id)) is not None and running.apart):
            self._go_alone(ask, answered)
            return
        if isinstance(ask, Settle) and claims:
            inner = answered

            def answered(reply: Reply) -> None:
                if isinstance(reply, Settled) and reply.rooms is not None:
                    self._learn(claims, reply.rooms)
                inner(reply)

        self._outbox.append((ask, answered))
        if self._flight is None:
            self._flight = asyncio.create_task(self._fly(), name="limits exchange")

    async def _fly(self) -> None:
        """One exchange at a time; what comes up meanwhile goes with the next."""
        REQUEST_ID.set("")  # it works for all, whoever was the first
        try:
            while self._outbox:
                batch, self._outbox = self._outbox[:MOST_AT_ONCE], self._outbox[MOST_AT_ONCE:]
                try:
                    replies = await self._place.exchange([ask for ask, _ in batch])
                except StoreUnavailable as error:
                    self._go_away(error)
                    for ask, answered in batch:
                        if isinstance(ask, Take) and ask.id in self._running:
                            self._running[ask.id].sure = False
                        self._go_alone(ask, answered)
                    for ask, answered in self._outbox:
                        self._go_alone(ask, answered)
                    self._outbox = []
                    return
                for (ask, answered), reply in zip(batch, replies, strict=True):
                    if isinstance(ask, Take) and isinstance(reply, (Taken, Refused)):
                        self._learn(ask.claims, reply.rooms)
                    answered(reply)
        finally:
            self._flight = None

    def _learn(self, claims: tuple[Claim, ...], rooms: tuple[Room, ...]) -> None:
        now = time.monotonic()
        known = self._known
        for claim, room in zip(claims, rooms, strict=True):
            known.pop(claim.subject, None)
            known[claim.subject] = (room, now)
            self._before.pop(claim.subject, None)
            if claim.budget is not None and self.budget_seen is not None:
                self.budget_seen(claim, room)
        while len(known) > KNOWN:
            del known[next(iter(known))]

    def _room(self, claim: Claim, now: float | None = None) -> Room:
        """How a claim stands at best, by what was last heard of it: with all that has refilled since."""
        found = self._known.get(claim.subject)
        if found is None:
            return Room(claim.requests or 0, claim.tokens or 0)
        room, at = found
        share = ((time.monotonic() if now is None else now) - at) / claim.window
        return Room(
            min(claim.requests, room.requests + share * claim.requests) if claim.requests is not None else 0.0,
            min(claim.tokens, room.tokens + share * claim.tokens) if claim.tokens is not None else 0.0,
            room.spent,
            room.held,
            room.running,
        )

    # Alone

    def _last_heard(self, claim: Claim) -> tuple[Room, bool] | None:
        """How it stood when it was last heard of, and whether that was before an earlier absence."""
        if claim.subject in self._known:
            return self._room(claim), False
        found = self._before.get(claim.subject)
        return None if found is None else (found[0], True)

    def _go_alone(self, ask: Ask, answered: Answered) -> None:
        """Answer an ask from this process's share, and keep what the place has to hear of it."""
        if isinstance(ask, (Settle, Charge)):
            self._owe(ask)
            answered(Settled())
        elif isinstance(ask, (Renew, Gone)):
            answered(Settled())
        else:
            running = self._running.get(ask.id)
            if running is None:
                answered(Extended(0))
                return
            reply = self._apart.answer(ask, running.take)
            if isinstance(ask, Take) and isinstance(reply, Taken):
                running.apart = True
            answered(reply)

    def _owe(self, ask: Settle | Charge) -> None:
        self._owed[ask.id] = ask
        if self._kept is not None:
            try:
                self._kept.add(ask)
            except OSError as error:
                # This process still knows it.
                self._log.warning("what is owed to the limits can't be kept", reason=str(error))

    def _go_away(self, error: StoreUnavailable) -> None:
        if self._return is None:
            self._log.warning("limits are kept apart", reason=error.message)
            self._apart.begin()
            self._return = asyncio.create_task(self._come_back(), name="limits return")

    async def _come_back(self) -> None:
        pause = FIRST_PROBE
        while True:
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PROBE)
            try:
                await self._place.reconnect()
                while self._owed:
                    part = dict(list(self._owed.items())[:MOST_AT_ONCE])
                    await self._place.tell(list(part.values()))
                    for id, ask in part.items():
                        if self._owed.get(id) is ask:
                            del self._owed[id]
            except StoreUnavailable:
                continue
            if self._kept is not None:
                try:
                    self._kept.clear()
                except OSError as error:
                    # Telling it again does no harm; staying away for good would.
                    self._log.warning("what was owed to the limits can't be removed", reason=str(error))
            self._before, self._known = self._before | self._known, {}
            while len(self._before) > KNOWN:
                del self._before[next(iter(self._before))]
            self._return = None
            self._log.info("limits are shared again")
            return

    async def _renew(self) -> None:
        REQUEST_ID.set("")  # it works for all, whoever was the first
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            ids = tuple(id for id, running in self._running.items() if not running.apart)
            apart = tuple(id for id, running in self._running.items() if running.apart)
            self._apart.answer(Renew(apart))
            for begin in range(0, len(ids), MOST_AT_ONCE):
                self._send(Renew(ids[begin : begin + MOST_AT_ONCE]), _ignore)


def _ignore(reply: Reply) -> None:
    """Nobody waits for it."""
