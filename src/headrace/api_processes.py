"""The API processes of a server, as the supervisor holds them: begun, replaced by others with another configuration, and ended.

All accept connections on the same listening socket, so one may leave while others go on: nothing is lost between them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from socket import socket
from typing import Any

from headrace.children import Child
from headrace.config import Config
from headrace.control import CloseDoor, Drain, Setup, ToChild, ToSupervisor
from headrace.errors import ModelError

LET_GO = 5.0
"""Seconds for a process that is replaced to stop taking connections; longer only if it hangs."""

Within = Callable[[asyncio.Future[Any], float], Awaitable[bool]]
"""Waits until it is done, so many seconds, or until somebody is in a hurry; whether it is done."""


class ApiProcesses:
    """`setup` makes a process's first message from its configuration; `received`, `changed` and `died` are as for `Child`.

    In `figures` all of them count for `/metrics`, those that are gone included, so that a counter never goes back.
    """

    def __init__(
        self,
        listening: socket,
        figures: Path,
        *,
        setup: Callable[[Config], Setup],
        received: Callable[[Child, ToSupervisor], None],
        changed: Callable[[Child], None],
        died: Callable[[int], None],
    ) -> None:
        self.current: list[Child] = []
        """Those that take new connections, one for each of `max_workers`."""
        self.broken: asyncio.Future[None]
        """From `begin` on: fails with `ModelError` if one of the first can't be started at all."""
        self._leaving: list[Child] = []
        self._keepers: dict[Child, asyncio.Task[None]] = {}
        self._quiet: dict[Child, asyncio.Event] = {}
        self._listening = listening
        self._figures = figures
        self._setup = setup
        self._received = received
        self._changed = changed
        self._died = died

    def __iter__(self) -> Iterator[Child]:
        return iter((*self.current, *self._leaving))

    def tell(self, message: ToChild) -> None:
        """Send to all that live."""
        for api in self:
            api.tell(message)

    def begin(self, config: Config) -> None:
        """Start them all."""
        self.broken = asyncio.get_running_loop().create_future()
        for _ in range(config.server.max_workers):
            api = self._start(config, essential=True)
            self.current.append(api)
            self._keepers[api].add_done_callback(self._ended_at_the_beginning)

    async def replace(self, config: Config, adopt: Callable[[], None]) -> None:
        """Put processes with that configuration in the places of those that are there, one by one, each when it is ready.

        `adopt` is called once the first of them is: from then on the configuration holds. Before that nothing has changed, and
        `ModelError` is raised if it can't be started.
        """
        trial = self._start(config, essential=True)
        # It hears what all are told, but isn't counted yet.
        self._leaving.append(trial)
        started = asyncio.create_task(trial.started.wait())
        try:
            await asyncio.wait((started, self._keepers[trial]), return_when=asyncio.FIRST_COMPLETED)
            if not trial.started.is_set():
                self._keepers[trial].result()
                raise ModelError("The server is stopping.")
        except BaseException:
            trial.retire()
            trial.kill()
            raise
        finally:
            started.cancel()
            self._leaving.remove(trial)
        adopt()
        before, self.current = self.current, [trial, *self.current[1:]]
        await self._let_go(before[0], config)
        for place in range(1, config.server.max_workers):
            # What the first could be started with, these can, sooner or later.
            api = self._start(config, essential=False)
            if place < len(before):
                self.current[place] = api
                self._leaving.append(before[place])
            else:
                self.current.append(api)
            await api.started.wait()
            if place < len(before):
                self._leaving.remove(before[place])
                await self._let_go(before[place], config)
        for surplus in before[config.server.max_workers :]:
            self.current.remove(surplus)
            await self._let_go(surplus, config)

    def is_quiet(self, api: Child) -> None:
        """It said `Quiet`."""
        if api in self._quiet:
            self._quiet[api].set()

    async def stop(self, timeout: float, end: float, within: Within, close_door: Callable[[], None]) -> None:
        """Let what runs finish, for `timeout` seconds; then `close_door`, after which no connection is let in; then let them leave.

        `end`: seconds that they get beyond that, and when somebody is in a hurry.
        """
        for api in self:
            api.retire()
            api.tell(Drain(timeout, replaced=api not in self.current))
        quiet = asyncio.gather(*(self._quiet[api].wait() for api in self.current if api in self._quiet))
        if not await within(quiet, timeout + end):
            self._hurry()
            await within(quiet, end)
        quiet.cancel()
        close_door()
        self.tell(CloseDoor())
        ended = asyncio.gather(*(api.ended.wait() for api in self))
        if not await within(ended, timeout + end):
            self._hurry()
            await within(ended, end)
        ended.cancel()
        await asyncio.gather(quiet, ended, return_exceptions=True)

    async def kill(self) -> None:
        """End what is left, at once."""
        for api in [*self._keepers]:
            api.retire()
            api.kill()
        keepers = [*self._keepers.values()]
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        self.broken.cancel()

    def _start(self, config: Config, *, essential: bool) -> Child:
        setup = self._setup(config)
        api = Child(
            "headrace.app",
            "API process",
            listening=self._listening,
            setup=lambda: setup,
            received=self._received,
            changed=self._changed,
            died=self._died,
            # prometheus_client reads the variable when it is imported.
            environment={"PROMETHEUS_MULTIPROC_DIR": str(self._figures)},
            essential=essential,
        )
        self._quiet[api] = asyncio.Event()
        self._keepers[api] = keeper = asyncio.create_task(api.keep(), name=api.name)
        keeper.add_done_callback(lambda _: self._ended(api))
        return api

    async def _let_go(self, api: Child, config: Config) -> None:
        """Its place is taken: it finishes what it has. Returns when it takes no new connections any more."""
        self._leaving.append(api)
        api.retire()
        # Nothing is in a hurry: no request need end for it.
        api.tell(Drain(max(config.server.drain_timeout, config.server.request_timeout), replaced=True))
        quiet = self._quiet.get(api)
        if quiet is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(quiet.wait(), LET_GO)

    def _hurry(self) -> None:
        self.tell(Drain(0))

    def _ended(self, api: Child) -> None:
        # A dead one is as quiet as can be.
        self._quiet.pop(api).set()
        self._keepers.pop(api)
        if api in self._leaving:
            self._leaving.remove(api)

    def _ended_at_the_beginning(self, keeper: asyncio.Task[None]) -> None:
        if not keeper.cancelled() and (error := keeper.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)
