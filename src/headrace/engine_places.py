"""A model's place among the children: the worker that serves it, and the one that stands by, if there is one.

Two processes take turns: when the one that serves dies, the one that stands by serves, and the dead one's successor stands by. Both are
watched by their pulses, and killed when they stall.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from headrace.children import STEADY, Child, listing
from headrace.config import ResilienceSection
from headrace.control import Promote, Setup, ToChild, ToSupervisor
from headrace.engine.pulse import Pulse, Reading
from headrace.errors import ConfigError
from headrace.stalls import LOOKS, StallWatch, WatchedTime, is_stopped, waited_for_processor
from headrace.types import DeathCause, EngineState, EngineStats, EngineStatus, ModelFiles

STORM = 60.0
"""Seconds from a death of the worker that serves in which another one makes it likely that more follow."""
BROUGHT_BACK = 1.0
"""Seconds without work after which an engine that is ready counts as brought back."""


def can_stand_by(files: ModelFiles) -> bool:
    """Whether a second process of that engine is of any use."""
    return files.kind != "remote"


def check_standby(rules: ResilienceSection, files: ModelFiles) -> None:
    """Raises `ConfigError` where a standby is asked for and the default model can't have one."""
    if rules.standby and not can_stand_by(files):
        raise ConfigError(
            f"standby = true makes no sense for {files.url or files.name}: a remote engine's model is loaded elsewhere, and its process"
            " here starts at once. Leave standby away, or name a second server in fallbacks."
        )


class EnginePlace:
    """Keeps a worker serving one model. What the supervisor does with a `Child` it does with this.

    `setup` makes what every worker of the place begins with; `folder` is private, for their pulses. `changed` is called when the
    place's `status` has changed, `received` with what its workers say. `module` is what a worker runs.
    """

    def __init__(
        self,
        name: str,
        *,
        listening: socket.socket,
        folder: Path,
        setup: Callable[[], Setup],
        rules: ResilienceSection,
        received: Callable[[Child, ToSupervisor], None],
        changed: Callable[[EnginePlace], None],
        essential: bool = True,
        standby: bool = False,
        module: str = "headrace.worker",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.deaths: Counter[DeathCause] = Counter()
        """Of workers that served."""
        self.rules = rules
        self.ended = asyncio.Event()
        self.started = asyncio.Event()
        """Set when a worker serves for the first time."""
        self._setup = setup
        self._folder = folder
        self._changed = changed
        self._blocks = 0
        """KV blocks of the worker that serves."""
        self._time = WatchedTime()
        self._died_at: deque[float] = deque(maxlen=2)
        """When workers that served did, of late."""
        self._failing_since: float | None = None
        """When the worker died since which none has done anything useful."""
        self._gave_up = ""
        """Why, once it has failed for too long."""
        self._said = EngineStatus(reason="It is being loaded.")
        self._retired = asyncio.Event()
        self._log = structlog.get_logger("headrace.supervisor").bind(child=name)

        def worker(number: int) -> Worker:
            return Worker(
                self,
                module,
                name if number == 0 else f"{name}-2",
                listening=listening,
                setup=setup,
                received=received,
                changed=self._worker_changed,
                environment=environment,
                # A standby that can't be had is no reason to serve nobody.
                essential=essential and number == 0,
            )

        self.active = worker(0)
        self.others = [worker(1)] if standby else []
        for other in self.others:
            other.standing_by = True

    @property
    def pid(self) -> int:
        return self.active.pid

    @property
    def state(self) -> EngineState:
        return self.status.state

    @property
    def reason(self) -> str:
        return self.status.reason

    @property
    def stats(self) -> EngineStats:
        return self.active.stats

    @property
    def restarts(self) -> int:
        return self.deaths.total()

    @property
    def status(self) -> EngineStatus:
        """What API processes are told."""
        state, reason = self.active.state, self.active.reason
        if self._gave_up and state == "starting":
            state, reason = "failed", self._gave_up
        return EngineStatus(state=state, reason=reason, restarts=self.restarts, pid=self.pid, deaths=dict(self.deaths))

    def tell(self, message: ToChild) -> None:
        """Send to all living processes."""
        for worker in (self.active, *self.others):
            worker.tell(message)

    def listings(self, model: str) -> list[dict[str, Any]]:
        """A line in the process list for each living process, the one that serves first."""
        lines = []
        for worker in (self.active, *self.others):
            line = listing(worker, model=model)
            if line is not None:
                restarts = self.restarts if worker is self.active else worker.deaths_standing_by
                stats = worker.stats
                shown = {"restarts": restarts, "running": stats.running, "waiting": stats.waiting}
                if stats.gpu_total:
                    shown |= {"gpu_used_mib": stats.gpu_used // 2**20, "gpu_total_mib": stats.gpu_total // 2**20}
                lines.append(line | shown)
        return lines

    async def keep(self) -> None:
        """Have a worker serving until `retire`. Raises `ModelError` if none ever becomes ready and none will."""
        tasks = [asyncio.create_task(worker.keep(), name=worker.name) for worker in (self.active, *self.others)]
        tasks.append(asyncio.create_task(self._watch(), name=f"watch {self.name}"))
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.ended.set()

    def retire(self) -> None:
        """Start no process again."""
        self._retired.set()
        for worker in (self.active, *self.others):
            worker.retire()

    def kill(self) -> None:
        """End all processes, now."""
        for worker in (self.active, *self.others):
            worker.kill()

    # Between the workers

    def beginning(self, worker: Worker, pulse: Path | None) -> Setup:
        """What a process of that worker begins with."""
        return msgspec.structs.replace(
            self._setup(),
            pulse="" if pulse is None else str(pulse),
            standing_by=worker.standing_by,
            in_hurry=len(self._died_at) > 1 and self.now - self._died_at[0] <= STORM,
            beside_standby=bool(self.others) and not worker.standing_by,
            kv_blocks=self._blocks if worker.standing_by else 0,
        )

    def new_pulse(self, numbers: itertools.count[int] = itertools.count()) -> Path:  # noqa: B008  (one sequence for all places)
        return self._folder / f"pulse-{next(numbers)}"

    @property
    def now(self) -> float:
        """Seconds that the supervisor has watched."""
        return self._time.now

    async def wait_to_stand_by(self) -> None:
        """Returns when a worker has served, or none will: only then there is anything to stand by for. Where workers die one after the
        other, the next standby is loaded while the one before, not ready yet, takes over: most of loading keeps one processor busy."""
        waits = [asyncio.create_task(event.wait()) for event in (self.started, self._retired)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def died(self, worker: Worker) -> None:
        """A process of that worker has ended. If it served, another takes its place at once, be it loaded or still loading."""
        if worker is not self.active:
            worker.deaths_standing_by += 1
            return
        self.deaths[worker.cause] += 1
        self._died_at.append(self.now)
        if worker.useful:
            self._failing_since, self._gave_up = None, ""
        if self._failing_since is None:
            self._failing_since = self.now
        for number, other in enumerate(self.others):
            if other.pid:
                self._log.info("standby takes over", child_pid=other.pid)
                self.active, self.others[number] = other, worker
                worker.standing_by, other.standing_by = True, False
                other.promote()
                return

    def _worker_changed(self, child: Child) -> None:
        if child is self.active and child.state == "ready":
            self.started.set()
            self._blocks = child.stats.blocks_total or self._blocks
        self._say()

    def _say(self) -> None:
        status = self.status
        if status != self._said:
            self._said = status
            self._changed(self)

    # The watch

    async def _watch(self) -> None:
        while not self._retired.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._retired.wait(), LOOKS)
            now = self._time.look()
            for worker in (self.active, *self.others):
                worker.look(now)
            self._judge(now)

    def _judge(self, now: float) -> None:
        """Has it failed for too long, or is it well again?"""
        if self._failing_since is None:
            return
        if self.active.useful:
            self._failing_since, self._gave_up = None, ""
        elif now - self._failing_since >= self.rules.give_up_after and self.active.state == "starting":
            self._gave_up = (
                f"The engine could not be brought back within {self.rules.give_up_after:g} s; it is still tried. {self.active.reason}"
            )
            self._say()


class Worker(Child):
    """One of the two: a process that runs an engine, and its successors."""

    def __init__(self, place: EnginePlace, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.standing_by = False
        self.deaths_standing_by = 0
        self._place = place
        self._pulse_file: Path | None = None
        self._watched: StallWatch | None = None
        self._idle_since: float | None = None

    @property
    def useful(self) -> bool:
        """Whether the last process did anything useful: it made tokens, or was there when nobody wanted any."""
        return self._tokens > 0 or self._idle_seconds >= BROUGHT_BACK

    def promote(self) -> None:
        """Serve, in place of the other one, which is gone."""
        self.state, self.reason = "starting", "The standby takes over."
        self._idle_since = None
        self.tell(Promote())

    def look(self, now: float) -> None:
        """Is it well? A process that isn't is killed; its successor is started when it is gone."""
        if not self.pid or self._retired.is_set():
            return
        ready = self._ready_since is not None
        if not ready or self._busy:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._watched is not None and (why := self._watched.look(now, ready=ready)):
            self.kill(why)

    async def _may_start(self) -> None:
        if self.standing_by:
            await self._place.wait_to_stand_by()

    async def _live(self) -> int:
        path = self._place.new_pulse()
        self._idle_since = None
        try:
            self._watched = StallWatch(
                Pulse.create(path),
                self._place.rules.stall_timeout,
                now=self._place.now,
                delays=lambda: waited_for_processor(self.pid),
                stopped=lambda: is_stopped(self.pid),
            )
            self._pulse_file = path
        except OSError as error:
            self._log.error("the engine can't be watched", path=str(path), reason=str(error))
            self._watched = self._pulse_file = None
        try:
            return await super()._live()
        finally:
            path.unlink(missing_ok=True)

    def _first_message(self) -> Setup:
        return self._place.beginning(self, self._pulse_file)

    def _progressed(self) -> bool:
        return self._tokens > 0 or self._idle_seconds >= STEADY

    def _pass_on(self) -> None:
        self._place.died(self)

    def _become(self, state: EngineState, reason: str) -> None:
        if state == "standby" and not self.standing_by:
            return  # said before it was promoted
        super()._become(state, reason)

    @property
    def _reading(self) -> Reading:
        return self._watched.reading if self._watched is not None else Reading(0, 0, False, 0, 0.0)

    @property
    def _tokens(self) -> int:
        return max(self._reading.tokens, self.stats.completion_tokens) if self._ready_since is not None else 0

    @property
    def _busy(self) -> bool:
        return self._reading.busy or self.stats.running > 0 or self.stats.waiting > 0

    @property
    def _idle_seconds(self) -> float:
        return 0.0 if self._idle_since is None else self._place.now - self._idle_since
