"""A child process of the supervisor: started, watched, and started again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from headrace.control import Alive, Setup, ToChild, ToSupervisor
from headrace.engine.frames import FrameConnection
from headrace.errors import ModelError
from headrace.types import DeathCause, EngineState, EngineStats, EngineStatus

FIRST_STARTS = 3
"""A child that was never ready is started so many times before the whole start is given up."""
STEADY = 10.0
"""Seconds of being ready that count as progress."""
LONGEST_PAUSE = 30.0
UNKILLABLE = 3.0
"""Seconds after which a process that was killed because it hangs is left behind: it waits in the kernel, for a device as a rule."""


class Child:
    """One place among the children, held by one process after another.

    `setup` makes each process's first message. `received` gets its messages, after the child has taken note of them;
    `changed` is called when its state has, `died` with a process's id when it has ended. All may be called until `ended` is set.
    `environment` is added to the supervisor's own. A child that isn't `essential` is tried again forever, also if it was never ready.
    """

    def __init__(
        self,
        module: str,
        name: str,
        *,
        listening: socket.socket,
        setup: Callable[[], Setup],
        received: Callable[[Child, ToSupervisor], None],
        changed: Callable[[Child], None],
        died: Callable[[int], None] = lambda pid: None,
        environment: Mapping[str, str] | None = None,
        essential: bool = True,
    ) -> None:
        self.name = name
        self.state: EngineState = "starting"
        self.reason = "It is being loaded."
        self.restarts = 0
        self.cause: DeathCause = "exited"
        """Of its last process's death."""
        self.stats = EngineStats()
        self.started = asyncio.Event()
        """Set when a process of this child is ready for the first time."""
        self.ended = asyncio.Event()
        """Set when no process lives and none will be started."""
        self._module = module
        self._listening = listening
        self._setup = setup
        self._received = received
        self._changed = changed
        self._died = died
        self._environment = environment or {}
        self._essential = essential
        self._process: asyncio.subprocess.Process | None = None
        self._connection: FrameConnection[ToSupervisor] | None = None
        self._retired = asyncio.Event()
        self._failures = 0
        self._ready_since: float | None = None
        self._verdict = ""
        self._condemned = asyncio.Event()
        self._left_behind: list[asyncio.subprocess.Process] = []
        """Held until they end, if they do."""
        self._fatal = False
        self._last_words = ""
        self._log = structlog.get_logger("headrace.supervisor").bind(child=name)

    @property
    def pid(self) -> int:
        """Of the living process; 0 if there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    @property
    def speaker(self) -> int:
        """Id of the process whose messages are heard: it may be dead by then."""
        return self._process.pid if self._process is not None else 0

    @property
    def status(self) -> EngineStatus:
        return EngineStatus(state=self.state, reason=self.reason, restarts=self.restarts, pid=self.pid)

    def tell(self, message: ToChild) -> None:
        """Send to the living process, if there is one."""
        if self._connection is not None:
            self._connection.send(message)

    async def keep(self) -> None:
        """Have a process running until `retire`. Raises `ModelError` if it never becomes ready and won't."""
        try:
            while True:
                await self._may_start()
                if self._retired.is_set():
                    return
                code = await self._live()
                if self._retired.is_set():
                    return
                self._note_death(code)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._retired.wait(), self._pause())
                self.restarts += 1
        finally:
            self.kill()
            self.ended.set()

    def retire(self) -> None:
        """Start no process again."""
        self._retired.set()
        self._become("stopping", "The server is stopping.")

    def kill(self, why: str = "") -> None:
        """End the living process, now; `why` if it is because it hangs."""
        process = self._process
        if process is not None and process.returncode is None:
            if why and not self._verdict:
                self._verdict = why
                self._condemned.set()
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def memory_mib(self) -> float | None:
        """Resident memory of the living process; None if it is gone, or where there is no /proc."""
        return memory_mib(self.pid)

    async def _may_start(self) -> None:
        """Returns when the next process may be started, or none will be."""

    def _first_message(self) -> Setup:
        return self._setup()

    def _pass_on(self) -> None:
        """Called when a process has died, before that is said to anybody."""

    def _progressed(self) -> bool:
        """Whether the process that died did something useful."""
        return self._ready_since is not None and time.monotonic() - self._ready_since >= STEADY

    async def _live(self) -> int:
        """One process, from start to end. Its exit status."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        silent = asyncio.Event()
        connection = FrameConnection[ToSupervisor](ToSupervisor, self._hear, silent.set)
        self._ready_since = None
        self._last_words, self._verdict, self._fatal = "", "", False
        self._condemned.clear()
        self.stats = EngineStats()
        try:
            with theirs:
                fds = (theirs.fileno(), self._listening.fileno())
                # -P: the folder that the server was started in is no place for modules.
                command = (sys.executable, "-P", "-m", self._module, *map(str, fds))
                self._process = await asyncio.create_subprocess_exec(
                    *command,
                    pass_fds=fds,
                    start_new_session=True,
                    stdin=asyncio.subprocess.DEVNULL,
                    env={**os.environ, **self._environment},
                )
        except BaseException:
            ours.close()
            raise
        await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
        self._connection = connection
        connection.send(self._first_message())
        if self._retired.is_set():
            self.kill()
        self._changed(self)
        pid, code = self._process.pid, await self._end_of(self._process)
        if code is None:
            self._log.error("process can't be killed and is left behind", child_pid=pid)
            self._left_behind.append(self._process)
            self._process = None
        else:
            # What it said last is still to be read.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(silent.wait(), 1)
        self._connection = None
        connection.abort()
        self._died(pid)
        return -signal.SIGKILL if code is None else code

    async def _end_of(self, process: asyncio.subprocess.Process) -> int | None:
        """Its exit status; None if it was killed because it hangs, and doesn't end."""
        ended, condemned = asyncio.ensure_future(process.wait()), asyncio.ensure_future(self._condemned.wait())
        try:
            await asyncio.wait((ended, condemned), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((ended,), timeout=UNKILLABLE)
            return ended.result() if ended.done() else None
        finally:
            ended.cancel()
            condemned.cancel()

    def _hear(self, message: ToSupervisor) -> None:
        if isinstance(message, Alive):
            if message.stats is not None:
                self.stats = message.stats
            if message.state in ("ready", "standby"):
                if self._ready_since is None:
                    self._ready_since = time.monotonic()
                    self.started.set()
                if not self._retired.is_set():
                    self._become(message.state, "")
            elif message.state == "failed":
                self._fatal = message.fatal
                self._last_words = message.reason
        self._received(self, message)

    def _note_death(self, code: int) -> None:
        self._failures = 1 if self._progressed() else self._failures + 1
        self.cause = "stalled" if self._verdict else "killed" if code < 0 else "exited"
        why = self._verdict or self._last_words or f"The process {describe_exit(code)}."
        self._log.error("process ended", child_pid=self._process.pid if self._process else 0, why=why, failures=self._failures)
        never = not self.started.is_set()
        if self._essential and never and (self._fatal or self._failures >= FIRST_STARTS):
            raise ModelError(why if self._fatal else f"The {self.name} could not be started; it was tried {self._failures} times. {why}")
        self._pass_on()
        state: EngineState = "failed" if never and self._fatal else "starting"
        self._become(state, f"{why} It is being started again.")

    def _pause(self) -> float:
        """Seconds before the next start: none after the first death, then doubling, a fifth more or less by chance."""
        if self._failures <= 1:
            return 0.0
        return min(0.25 * 2.0 ** min(self._failures - 2, 10), LONGEST_PAUSE) * random.uniform(0.8, 1.2)

    def _become(self, state: EngineState, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            self.state, self.reason = state, reason
            self._changed(self)


def describe_exit(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"ended with status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")


def memory_mib(pid: int) -> float | None:
    """Resident memory of a living process in MiB; None if it is gone or a zombie, or where there is no /proc."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1) if pid and pages else None


def listing(child: Child, **more: Any) -> dict[str, Any] | None:
    """The child's line in the process list; None while no process of it lives."""
    memory = child.memory_mib()
    if not child.pid or (sys.platform == "linux" and memory is None):
        return None
    return {"pid": child.pid, **more, "state": child.state, "restarts": child.restarts, "memory_mib": memory}
