"""The engines of a server: which models are loaded is decided in `stables`, and done here.

A model has a place for each of its replicas while it is loaded, and none while it isn't. Its sockets are there all the time, so that
connections of API processes wait for whoever serves next. Before a model is unloaded every API process is asked to hand it nothing any
more (`control.Hold`): no request is lost, and one that comes in between waits, and has the model loaded again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import structlog

from headrace.address import ENGINE_SOCKET, listen_privately
from headrace.children import Child
from headrace.config import Config
from headrace.control import (
    EngineChanged,
    Held,
    Hold,
    ModelInUse,
    ModelKnown,
    ModelRefusal,
    Release,
    ServedHere,
    Setup,
    Stop,
    ToChild,
    ToSupervisor,
    config_to_json,
)
from headrace.engine_places import EnginePlace, can_stand_by
from headrace.errors import ConfigError, ModelError, ModelNotLoaded, ModelRefused, ModelTooLarge
from headrace.fleet import Member, arithmetic, fetched, kv_bytes, needs
from headrace.stables import Fetch, Load, Refuse, Stables, Stall, Unload, gib
from headrace.types import EngineState, EngineStatus, ModelFiles

END_TIMEOUT = 3.0
"""Seconds that a worker gets to free everything."""
GENTLE_TIMEOUT = 2.0
"""Seconds in which API processes say whether a model is idle; one that doesn't say so needs it."""
PATIENCE = 5.0
"""Seconds in which others may come to rest and make room for a model that an administrator wants."""
AT_THE_START = "the start"
"""Who uses the default model until it was ready for the first time."""


class Residence:
    """Where one model's workers live."""

    def __init__(self, member: Member, paths: Sequence[Path]) -> None:
        self.member = member
        self.files = member.files
        self.paths = tuple(paths)
        self.listening: list[socket.socket] = []
        try:
            for path in paths:
                self.listening.append(listen_privately(path))
        except OSError:
            self.close()
            raise
        self.places: list[EnginePlace] = []
        self.keepers: list[asyncio.Task[None]] = []
        self.failure = ""
        """Why it could not be loaded the last time, if so."""
        self.waits = ""
        """Why it is wanted and not loaded, as API processes know it."""
        self.was_ready = asyncio.Event()
        """Set when it was ready for the first time."""
        self.answers = asyncio.Event()
        """Set when requests for it are answered: it was ready, or can't be reached and has fallbacks."""

    @property
    def name(self) -> str:
        return self.files.name

    def status(self, stall: Stall, *, managed: bool) -> EngineStatus:
        """What API processes are told."""
        if not self.places:
            state: EngineState = "absent" if stall.state in ("absent", "draining") else "loading"
            return EngineStatus(state=state, reason="It is loaded when it is asked for." if state == "absent" else "It is being loaded.")
        said = [place.status for place in self.places]
        best = min(
            said,
            key=lambda status: (
                ("ready", "starting", "standby").index(status.state) if status.state in ("ready", "starting", "standby") else 9
            ),
        )
        if len(said) > 1:
            deaths = {cause: sum(status.deaths.get(cause, 0) for status in said) for status in said for cause in status.deaths}
            best = EngineStatus(
                state=best.state, reason=best.reason, restarts=sum(status.restarts for status in said), pid=best.pid, deaths=deaths
            )
        if managed and stall.state == "loading" and best.state == "starting":
            return EngineStatus(state="loading", reason=best.reason, restarts=best.restarts, deaths=best.deaths)
        return best

    def close(self) -> None:
        for listening in self.listening:
            listening.close()


class _Holding:
    """Waiting for API processes to let go of a model."""

    def __init__(self, number: int, gently: bool) -> None:
        self.number = number
        self.gently = gently
        self.pending: set[int] = set()
        """Process ids."""
        self.refused = False
        self.over = asyncio.Event()

    def heard(self, pid: int, done: bool) -> None:
        self.refused |= not done
        self.pending.discard(pid)
        if not self.pending or self.refused:
            self.over.set()


class EngineYard:
    """`stables` knows the budget; `current` by family the version its name stands for; `managed` where there are several models, so
    that they come and go. `tell` sends to all API processes, `apis` gives them; `received` hears what workers say."""

    def __init__(
        self,
        config: Config,
        members: Sequence[Member],
        folder: Path,
        started_at: float,
        *,
        budget: dict[str, int],
        managed: bool,
        default: str,
        received: Callable[[Child, ToSupervisor], None],
        tell: Callable[[ToChild], None],
        apis: Callable[[], Iterable[Child]],
    ) -> None:
        self.config = config
        self.managed = managed
        self.default = default
        self.stables = Stables(budget)
        self.residences: dict[str, Residence] = {}
        self.broken: asyncio.Future[None]
        """From `begin` on: fails with `ModelError` if the default model can't be loaded at all. One that is elsewhere may be away where
        it has fallbacks."""
        self._folder = folder
        self._started_at = started_at
        self._received = received
        self._tell = tell
        self._apis = apis
        self._local = sum(member.files.kind in ("openvino", "transformers", "vllm") for member in members)
        self._sockets = itertools.count()
        self._numbers = itertools.count(1)
        self._holdings: dict[str, _Holding] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stirred = asyncio.Event()
        self._ended = False
        self._log = structlog.get_logger("headrace.supervisor")
        for member in members:
            self.add(member)
        self._check_budget()

    # What there is

    def add(self, member: Member) -> None:
        """A model that may be asked for."""
        entry = member.entry
        numbers = (next(self._sockets) for _ in range(entry.replicas if entry is not None else 1))
        paths = [self._folder / (ENGINE_SOCKET + (f"-{number}" if number else "")) for number in numbers]
        self.residences[member.files.name] = Residence(member, paths)
        wants = None if member.files.pending else self._needs(member, member.files)
        pinned = entry.pinned if entry is not None else True
        self.stables.add(member.files.name, wants, pinned=pinned, keep_alive=entry.keep_alive if entry is not None else None)

    def remove(self, name: str) -> None:
        """Forget a model that was just added."""
        self.residences.pop(name).close()
        self.stables.remove(name)

    def _needs(self, member: Member, files: ModelFiles) -> dict[str, int]:
        if not self.managed:
            return {}
        wants = needs(self.config, member, files, self.stables.budget)
        twice = self.config.resilience.standby and can_stand_by(files)
        return {pool: size * (2 if twice else 1) for pool, size in wants.items()}

    def _check_budget(self) -> None:
        """Raises `ConfigError` where what must be loaded at the start doesn't fit."""
        first = [stall for stall in self.stables if stall.pinned or stall.name == self.default]
        for pool, end in self.stables.budget.items():
            sizes = {stall.name: (stall.needs or {}).get(pool, 0) for stall in first}
            if sum(sizes.values()) > end:
                parts = " + ".join(f"{gib(size)} ({name})" for name, size in sizes.items() if size)
                raise ConfigError(
                    f"The default model and those that are pinned don't fit into the budget for {pool}, {gib(end)}: {parts}. "
                    "Raise memory_budget_gib, or lower kv_cache_gib."
                )

    @property
    def files(self) -> list[ModelFiles]:
        return [residence.files for residence in self.residences.values()]

    def api_setup(self, config: Config, current: dict[str, str]) -> Setup:
        """What an API process begins with."""
        here = [
            ServedHere(
                each.member.family,
                "" if each.member.entry is None else each.member.entry.model_dump_json(exclude={"remote_api_key"}),
                [str(path) for path in each.paths[1:]],
            )
            for each in self.residences.values()
        ]
        paths = [str(each.paths[0]) for each in self.residences.values()]
        return Setup(config_to_json(config), self.files, paths, self._started_at, served=here if self.managed else [], current=current)

    def statuses(self) -> list[tuple[ModelFiles, EngineStatus]]:
        return [(each.files, self._status(each)) for each in self.residences.values()]

    def _status(self, residence: Residence) -> EngineStatus:
        return residence.status(self.stables[residence.name], managed=self.managed)

    def listings(self) -> list[dict[str, Any]]:
        """A line in the process list for each living worker."""
        return [line for each in self.residences.values() for place in each.places for line in place.listings(each.files.public_name)]

    # Life

    def begin(self) -> None:
        """Load what is to be there from the start."""
        self.broken = asyncio.get_running_loop().create_future()
        self.stables.ask(self.default, AT_THE_START, time.monotonic())
        self._spawn(self._work(), "models")

    async def stop(self, within: Callable[[asyncio.Future[Any], float], Any]) -> bool:
        """Have all workers free everything and leave; whether they did so by themselves."""
        self._ended = True
        places = [place for each in self.residences.values() for place in each.places]
        for place in places:
            place.retire()
            place.tell(Stop())
        gone = asyncio.gather(*(place.ended.wait() for place in places))
        in_time = bool(await within(gone, END_TIMEOUT))
        gone.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await gone
        return in_time

    async def kill(self) -> None:
        """End what is left, at once."""
        self._ended = True
        keepers = [keeper for each in self.residences.values() for keeper in each.keepers]
        for each in self.residences.values():
            for place in each.places:
                place.retire()
                place.kill()
        for task in (*self._tasks, *keepers):
            task.cancel()
        await asyncio.gather(*self._tasks, *keepers, return_exceptions=True)
        self.broken.cancel()
        for each in self.residences.values():
            each.close()

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)

    # News

    def hear(self, child: Child, message: Held | ModelInUse) -> None:
        """What API processes say."""
        if isinstance(message, Held):
            holding = self._holdings.get(message.model)
            if holding is not None and holding.number == message.number:
                holding.heard(child.pid, message.done)
        elif message.model in self.residences:
            now = time.monotonic()
            if message.in_use:
                self.stables.ask(message.model, child.pid, now)
            else:
                self.stables.leave(message.model, child.pid, now)
            self.stir()

    def api_began(self, api: Child) -> None:
        """Tell a process that has just begun how everything stands; telling it again does no harm."""
        for files, status in self.statuses():
            if self.managed and not files.pending:
                api.tell(ModelKnown(files))
            api.tell(EngineChanged(files.name, status))
        for model, holding in self._holdings.items():
            if api.pid:
                holding.pending.add(api.pid)
                api.tell(Hold(model, holding.number, holding.gently))

    def api_died(self, pid: int) -> None:
        self.stables.forget(pid, time.monotonic())
        for holding in self._holdings.values():
            if pid in holding.pending:
                holding.heard(pid, True)
        self.stir()

    def stir(self) -> None:
        """Something has changed: see what is to be done."""
        stirred, self._stirred = self._stirred, asyncio.Event()
        stirred.set()

    async def change(self) -> None:
        """Returns when something may have changed."""
        await self._stirred.wait()

    async def have(self, name: str) -> None:
        """Have a model loaded, and kept until `let_go`. Raises `ModelRefused` where it can't be."""
        residence, stall = self.residences[name], self.stables[name]
        residence.failure = ""
        patience = time.monotonic() + PATIENCE
        self.stables.keep(name)
        try:
            while stall.state != "ready" or stall.leaving:
                stirred = self._stirred
                self._follow_orders()
                if residence.failure:
                    raise ModelRefused(residence.failure if name in residence.failure else f"{name} can't be loaded: {residence.failure}")
                stuck = stall.state == "absent" and stall.needs is not None and not any(each.state == "draining" for each in self.stables)
                if stuck and time.monotonic() >= patience:
                    raise ModelRefused(f"{name} can't be loaded now: {self.stables.why_not(name)}.")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stirred.wait(), max(0.001, patience - time.monotonic()) if stuck else None)
        except BaseException:
            self.let_go(name)
            raise

    def let_go(self, name: str) -> None:
        self.stables.let_go(name, time.monotonic())
        self.stir()

    async def unload(self, name: str) -> None:
        """Unload a model once what runs is over. Raises `ModelRefused`."""
        stall = self.stables[name]
        if stall.state in ("fetching", "loading"):
            raise ModelRefused(f"{name} is being loaded.")
        if stall.kept:
            raise ModelRefused(f"{name} takes part in an upgrade.")
        if stall.pinned:
            raise ModelRefused(f"{name} is pinned: it is never unloaded.")
        self.stables.unload(name)
        self.stir()
        while stall.leaving or stall.state == "draining":
            await self.change()

    # Work

    async def _work(self) -> None:
        while True:
            stirred = self._stirred
            self._follow_orders()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stirred.wait(), self.stables.next_look(time.monotonic()))

    def _follow_orders(self) -> None:
        orders = [] if self._ended else self.stables.orders(time.monotonic())
        for order in orders:
            residence = self.residences[order.name]
            if isinstance(order, Fetch):
                self._spawn(self._fetch(residence), f"fetch {order.name}")
            elif isinstance(order, Load):
                self._load(residence)
            elif isinstance(order, Unload):
                self._spawn(self._unload(residence, order.gentle), f"unload {order.name}")
            elif isinstance(order, Refuse):
                sum_ = arithmetic(self.config, residence.member, residence.files, self.stables.budget)
                self._refuse(residence, ModelTooLarge(f"{order.name} can't be loaded: {order.reason}. {sum_}".rstrip()))
        if orders:
            self.stir()
        self._say_who_waits()

    def _say_who_waits(self) -> None:
        if self.managed:
            for residence in self.residences.values():
                stall = self.stables[residence.name]
                waits = stall.state == "absent" and stall.turn > 0
                why = f"waits for memory: {self.stables.why_not(residence.name)}" if waits else ""
                if why != residence.waits:
                    residence.waits = why
                    if why:
                        self._tell(EngineChanged(residence.name, EngineStatus(state="absent", reason=why)))

    def _refuse(self, residence: Residence, error: ModelTooLarge | ModelNotLoaded) -> None:
        residence.failure = error.message
        self._log.error("model can't be loaded", model=residence.name, reason=error.message)
        self._tell(ModelRefusal(residence.name, error.code, error.message))
        self._never_ready(residence, error.message)

    def _never_ready(self, residence: Residence, reason: str) -> None:
        """It couldn't be loaded, or couldn't again. The server is there for the default model; if it never was, that ends."""
        if residence.name != self.default or residence.was_ready.is_set():
            return
        if self._has_others(residence):
            residence.answers.set()
        elif not self.broken.done():
            self.broken.set_exception(ModelError(reason))

    def _has_others(self, residence: Residence) -> bool:
        """Whether it is elsewhere, where it may be away for a while, and others answer then."""
        if residence.files.kind != "remote":
            return False
        names = (residence.name, *residence.files.aliases, residence.member.family)
        return any(self.config.resilience.fallbacks.get(name) for name in names)

    async def _fetch(self, residence: Residence) -> None:
        name, now = residence.name, time.monotonic
        self._tell(EngineChanged(name, self._status(residence)))
        try:
            files = await asyncio.to_thread(fetched, residence.member)
            wants = self._needs(residence.member, files)
        except (ModelError, ConfigError) as error:
            self.stables.failed(name, now())
            self._refuse(residence, ModelNotLoaded(f"{name} can't be fetched: {error.message}", retry_after=30))
        else:
            residence.files = files
            self.stables.found(name, wants)
            self._tell(ModelKnown(files))
        self.stir()

    def _load(self, residence: Residence) -> None:
        member, config = residence.member, self.config
        essential = self.managed or (residence.name == self.default and not self._has_others(residence))
        engine = config.engine
        if self.managed and residence.files.kind in ("openvino", "transformers", "vllm"):
            engine = engine.model_copy(update={"kv_cache_gib": kv_bytes(config, member, residence.files, self.stables.budget) / 2**30})
        # A worker has no business with keys.
        said = config_to_json(Config(model=member.section, engine=engine, log=config.log, overload=config.overload))
        share = 1.0 if self.managed else 1 / max(1, self._local)
        standby = config.resilience.standby and can_stand_by(residence.files)
        first = next(iter(self.residences)) == residence.name
        for number, (path, listening) in enumerate(zip(residence.paths, residence.listening, strict=True)):
            setup = Setup(said, [residence.files], [str(path)], self._started_at, share)
            place = EnginePlace(
                ("engine" if first and not self.managed else f"engine {residence.name}") + (f" #{number + 1}" if number else ""),
                listening=listening,
                folder=self._folder,
                setup=lambda setup=setup: setup,  # type: ignore[misc]
                rules=config.resilience,
                received=self._received,
                changed=lambda place: self._changed(residence),
                # The server is there for the default model; what may be away is what others are for.
                essential=essential and not number,
                standby=standby,
            )
            residence.places.append(place)
            residence.keepers.append(asyncio.create_task(place.keep(), name=place.name))
        if self.managed:
            self._log.info("loading", model=residence.name)
        self._tell(EngineChanged(residence.name, self._status(residence)))
        self._spawn(self._await_ready(residence), f"load {residence.name}")

    def _changed(self, residence: Residence) -> None:
        status = self._status(residence)
        self._tell(EngineChanged(residence.name, status))
        if status.state == "failed":
            self._never_ready(residence, status.reason)

    async def _await_ready(self, residence: Residence) -> None:
        started = [asyncio.create_task(place.started.wait()) for place in residence.places]
        try:
            await asyncio.wait((*started, residence.keepers[0]), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in started:
                each.cancel()
        name, now = residence.name, time.monotonic()
        if any(place.started.is_set() for place in residence.places):
            residence.failure = ""
            residence.was_ready.set()
            residence.answers.set()
            self.stables.ready(name, now)
            self.stables.leave(name, AT_THE_START, now)
            if self.managed:
                self._log.info("loaded", model=name)
            self._tell(EngineChanged(name, self._status(residence)))
            self.stir()
            return
        if self._ended:
            return
        keeper = residence.keepers[0]
        reason = "its worker ended."
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            if not isinstance(error, ModelError):
                raise error
            reason = error.message
        await self._leave(residence)
        self.stables.failed(name, now)
        self._never_ready(residence, reason)
        self._refuse(residence, ModelNotLoaded(reason if name in reason else f"{name} can't be loaded: {reason}", retry_after=10))
        self.stir()

    async def _unload(self, residence: Residence, gentle: bool) -> None:
        name = residence.name
        holding = self._holdings[name] = _Holding(next(self._numbers), gentle)
        apis = [api for api in self._apis() if api.pid]
        holding.pending.update(api.pid for api in apis)
        for api in apis:
            api.tell(Hold(name, holding.number, gentle))
        if not holding.pending:
            holding.over.set()
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(holding.over.wait(), GENTLE_TIMEOUT if gentle else self.config.server.drain_timeout)
        finally:
            del self._holdings[name]
        if gentle and (holding.refused or holding.pending):
            self._tell(Release(name))
            self.stables.spared(name, time.monotonic())
        else:
            # What hasn't ended by now goes on when the model is loaded again.
            await self._leave(residence)
            self._log.info("unloaded", model=name)
            self.stables.gone(name)
            self._tell(EngineChanged(name, self._status(residence)))
            self._tell(Release(name))
        self.stir()

    async def _leave(self, residence: Residence) -> None:
        """Its workers free everything and are gone."""
        places, keepers = residence.places, residence.keepers
        residence.places, residence.keepers = [], []
        for place in places:
            place.retire()
            place.tell(Stop())
        ended = asyncio.gather(*keepers, return_exceptions=True)
        try:
            await asyncio.wait_for(asyncio.shield(ended), END_TIMEOUT)
        except TimeoutError:
            for place in places:
                place.kill()
            await ended
