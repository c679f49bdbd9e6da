"""The parent of all processes, `headrace serve`: takes the address, brings the model, starts the children, and stops them in order.

`serve` is the whole life of a server; `Supervisor.run` is its part with children.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from headrace import __version__, logs, quarantine
from headrace.address import auth_at, bind, cannot_bind, leave_word, let_nobody_in, private_folder, url_of
from headrace.alerts import Alerts
from headrace.api_processes import ApiProcesses
from headrace.children import Child, listing, memory_mib
from headrace.circuits import CircuitTable
from headrace.claims import Ask, Gone
from headrace.config import Config
from headrace.control import (
    AskLimits,
    AskModels,
    AskProbe,
    AskProcesses,
    AskReload,
    BudgetSeen,
    CircuitCalls,
    ErrorsNoted,
    Held,
    KeyMet,
    LimitsAnswer,
    ModelInUse,
    ModelsAnswer,
    ProbeEnded,
    Processes,
    Quarantine,
    Quiet,
    Reloaded,
    RequestsEnded,
    Setup,
    ShadowCompared,
    ToChild,
    ToSupervisor,
    TurnMoves,
    TurnWords,
    VersionPromoted,
)
from headrace.engine_places import check_standby
from headrace.engine_yard import EngineYard
from headrace.error_tracking import ErrorTracker
from headrace.errors import ConfigError, ModelError, ModelNotFound, ModelRefused, StoreUnavailable
from headrace.fleet import Member, budgets, current_versions
from headrace.lineup import lineup
from headrace.policies.breaker import BreakerRules
from headrace.policies.filter_input import filter_steps
from headrace.policies.prices import Prices
from headrace.policies.turn_table import TurnTable, TurnWord
from headrace.records import UsageRow
from headrace.reload import added, changes, usable
from headrace.stores.cache_open import second_level
from headrace.stores.data_dir import database_url, journal_folder, owed_folder
from headrace.stores.database import Database
from headrace.stores.error_writer import ErrorWriter
from headrace.stores.errors_sql import SqlErrors
from headrace.stores.ledger_sql import SqlLedger
from headrace.stores.limit_table import LimitTable
from headrace.stores.limits_open import settlement
from headrace.stores.limits_owed import OwedByTheDead
from headrace.stores.opening import prepare_stores
from headrace.stores.recovery import Recovery
from headrace.stores.sql_keys import SqlKeys
from headrace.tls import check_tls
from headrace.tracing import check_tracing
from headrace.upgrades import Upgrades, remembered

RECOVERY_TIMEOUT = 20.0
"""Seconds that a start waits for the bills that an earlier server left; the rest of them is settled while it serves."""
END_TIMEOUT = 3.0
"""Seconds that API processes get beyond the drain timeout to tell their clients, and workers to free everything."""

MOST_KEYS_MET = 1000
"""Keys that an API process is told of when it begins; it asks the store for each of them at once."""
PROMOTIONS = "promotions.json"
"""In `data_dir`: which version each model's name stands for, and which it stood for before."""
ERRORS_TIMEOUT = 2.0
"""Seconds at the end for what is still to be written into the error book."""


def serve(config: Config, reread: Callable[[], Config] | None = None) -> int:
    """Serve until a signal says stop; the exit status. Raises `ConfigError` and `ModelError` where the start is refused.

    `reread` reads the configuration's sources again, for a reload; it raises `ConfigError`.
    """
    started_at, read = time.monotonic(), config
    logs.configure(config.log, "supervisor")
    with bind(config.server, config.access) as bound:
        config = config.model_copy(update={"access": config.access.model_copy(update={"auth": auth_at(bound, config.access)})})
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with ThreadPoolExecutor(1) as aside:
                prepared = aside.submit(asyncio.run, prepare_stores(config.store))
                tls = check_tls(config.tls)
                check_tracing(config.trace)
                if config.cache.response_cache == "on":
                    second_level(config)
                # A pattern that can't be used stops the start here, not each API process.
                filter_steps(config.filters)
                config, members = lineup(config)
                check_standby(config.resilience, members[0].files)
                if prepared.result() == 0 and config.access.auth == "keys" and not config.access.api_keys:
                    structlog.get_logger("headrace.supervisor").warning(
                        "no key would be let in", advice="auth is keys, and there is none yet: headrace keys create --name NAME"
                    )
        except KeyboardInterrupt as interrupt:
            return 0 if interrupt.args else 130
        finally:
            signal.signal(signal.SIGTERM, before)
        folder = private_folder()
        try:
            leave_word(folder, bound.getsockname()[1], config.store.data_dir)
            return asyncio.run(Supervisor(config, members, bound, folder, started_at, tls=tls, read=read, reread=reread).run())
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _has_terminal() -> bool:
    """Whether this process belongs to a terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Supervisor:
    """The children of one server: an engine worker for each model, and API processes that share them."""

    def __init__(
        self,
        config: Config,
        members: list[Member],
        bound: socket.socket,
        folder: Path,
        started_at: float,
        *,
        tls: bool = False,
        read: Config | None = None,
        reread: Callable[[], Config] | None = None,
    ) -> None:
        self._config = config
        self._members = members
        self._read = config if read is None else read
        """The configuration as its sources say it."""
        self._reread = reread
        self._reloading = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()
        self._bound = bound
        self._tls = tls
        self._started_at = started_at
        managed = bool(config.fleet.models)
        names = [member.files.name for member in members]
        promotions = config.store.data_dir.expanduser() / PROMOTIONS
        current, before = remembered(promotions, current_versions(members), names)
        self._yard = EngineYard(
            config,
            members,
            folder,
            started_at,
            budget=budgets(config) if managed else {},
            managed=managed,
            default=current.get(members[0].family, members[0].files.name),
            received=self._hear,
            tell=self._tell_apis,
            apis=lambda: self._apis,
        )
        self._upgrades = Upgrades(self._yard, current, before, lambda: self._config.fleet, self._tell_apis, promotions)
        self._asked: set[asyncio.Task[None]] = set()
        self._limits = LimitTable()
        """Of `limits_url = memory://`; of requests and budgets it knows what API processes ask."""
        self._turn_words: dict[int, list[tuple[bytes, int, TurnWord]]] = {}
        """What is to be told by `_say_turns`, by process."""
        self._turns = TurnTable(lambda pid, *word: self._turn_words.setdefault(pid, []).append(word))
        self._signals = 0
        self._signalled = asyncio.Event()
        self._quarantined = {name: quarantine.Quarantine() for name in names}
        self._keys_met: dict[bytes, None] = {}
        """Digests of keys that API processes have told of, for those that begin later; the one that was told of last is the last."""
        self._circuits = CircuitTable(names, BreakerRules.of(config.resilience), self._tell_apis)
        self._figures = folder / "figures"
        self._figures.mkdir()
        self._apis = ApiProcesses(
            bound, self._figures, setup=self._api_setup, received=self._hear, changed=self._api_changed, died=self._api_died
        )
        self._database = Database(database_url(config.store))
        self._errors = ErrorWriter(SqlErrors(self._database))
        self._alerts = Alerts(
            config.alerts,
            self._engines_down,
            SqlKeys(self._database),
            instance=f"{socket.gethostname()}:{bound.getsockname()[1]}",
            url=url_of(bound, tls=tls),
        )
        self._recovery: Recovery | None = None
        """Settles what API processes leave when they die, this server's and those of servers before it."""
        if config.ledger.ledger == "on":
            self._recovery = Recovery(SqlLedger(self._database), journal_folder(config.store), Prices(config.ledger))
            self._recovery.told = self._bills_recovered
            self._recovery.owed = self._limits_recovered
            self._recovery.over = lambda writer: self._limits_recovered([Gone(writer)])
        self._owed = OwedByTheDead(owed_folder(config.store))
        self._log = structlog.get_logger("headrace.supervisor")

    async def run(self) -> int:
        """Until a signal says stop. Raises `ModelError` if a child can't be started at all."""
        try:
            self._bound.listen(2048)
        except OSError as error:
            raise cannot_bind(self._config.server, error) from error
        self._catch_signals()
        tracker = ErrorTracker("supervisor", self._errors.add)
        logs.watch(tracker.watch_log)
        if self._recovery is not None:
            # First: budgets begin with what the ledger says.
            await self._recovery.once(RECOVERY_TIMEOUT)
        recovering = asyncio.create_task(self._recover(), name="recovery")
        alerting = asyncio.create_task(self._alerts.run(), name="alerts")
        booking = asyncio.create_task(self._errors.run(), name="error book")
        owing = asyncio.create_task(self._owed.run(lambda: self._config.limits.limits_url), name="limits owed")
        self._yard.begin()
        self._apis.begin(self._config)
        announcer = asyncio.create_task(self._announce())
        signalled = asyncio.create_task(self._signalled.wait())
        try:
            ends: list[asyncio.Future[Any]] = [self._yard.broken, self._apis.broken, signalled]
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if signalled not in done:
                for end in ends:
                    if end in done:
                        end.result()
            await self._stop()
            if self._recovery is not None:
                await self._recovery.once(END_TIMEOUT)
            if self._config.limits.limits_url != "memory://":
                # What isn't heard now the next server tells.
                with contextlib.suppress(StoreUnavailable, TimeoutError):
                    await asyncio.wait_for(self._owed.tell(self._config.limits.limits_url), END_TIMEOUT)
        finally:
            await self._apis.kill()
            for asked in self._asked:
                asked.cancel()
            await self._yard.kill()
            for task in (announcer, signalled, recovering, alerting, booking, owing):
                task.cancel()
            await asyncio.gather(announcer, signalled, recovering, alerting, booking, owing, *self._asked, return_exceptions=True)
            tracker.flush()
            await self._errors.finish(ERRORS_TIMEOUT)
            await self._database.close()
        return 0

    async def _recover(self) -> None:
        if self._recovery is not None:
            await self._recovery.run()

    # Beginning

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        # Under nohup a window that is closed stops nothing; what is sent on purpose still has its meaning.
        survives = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        loop.add_signal_handler(signal.SIGHUP, self._on_hangup, _has_terminal() and not survives)

    def _on_signal(self) -> None:
        self._signals += 1
        self._signalled.set()
        self._signalled = asyncio.Event()

    def _on_hangup(self, had_terminal: bool) -> None:
        if had_terminal and not _has_terminal():
            # It is what it says: the window was closed.
            self._on_signal()
        else:
            self._reload_for(None)

    async def _announce(self) -> None:
        default = self._yard.residences[self._yard.default]
        for started in (default.answers, *(api.started for api in self._apis.current)):
            await started.wait()
        url = url_of(self._bound, tls=self._tls)
        seconds = time.monotonic() - self._started_at
        files = default.files
        name = files.public_name
        notes = files.notes
        if not default.was_ready.is_set():
            notes = (*notes, f"{name} can't be reached, and is tried again now and then. Until then its fallbacks answer.")
        if sys.stderr.isatty():
            for note in notes:
                sys.stderr.write(f"{note}\n")
            sys.stderr.write(f"Serving {name} at {url} after {seconds:.1f} s (try {url}/docs; Ctrl-C stops)\n")
            sys.stderr.flush()
        else:
            for note in notes:
                self._log.info("note", note=note)
            self._log.info("ready", url=url, model=name, seconds=round(seconds, 2))

    def _api_setup(self, config: Config) -> Setup:
        return self._yard.api_setup(config, self._upgrades.current)

    # A new configuration

    async def reload(self) -> list[str]:
        """Read the sources again and put API processes with the new configuration in the places of the old; the settings that differ.

        Raises `ConfigError` and `ModelError` where it isn't taken; then everything is as it was.
        """
        async with self._reloading:
            if self._reread is None:
                raise ConfigError("This server's configuration has no sources that could be read again.")
            read = await asyncio.to_thread(self._reread)
            changed = changes(self._read, read)
            new = await asyncio.to_thread(added, self._read, read, self._members)
            config = await asyncio.to_thread(usable, self._read, read, self._bound, [*self._members, *new])
            self._take_in(config, new)
            try:
                await self._apis.replace(config, lambda: self._adopt(config, read))
            except BaseException:
                self._put_out(new)
                raise
            self._yard.stir()
            return changed

    def _take_in(self, config: Config, members: list[Member]) -> None:
        """Serve further models."""
        for member in members:
            name = member.files.name
            self._members.append(member)
            self._circuits.add(name, BreakerRules.of(config.resilience))
            self._quarantined[name] = quarantine.Quarantine()
            self._yard.add(member)
            self._upgrades.add(member.family, name)

    def _put_out(self, members: list[Member]) -> None:
        for member in members:
            name = member.files.name
            if self._yard.stables[name].state != "absent":
                continue  # a pinned one that is loading already; nobody asks for it
            self._members.remove(member)
            self._circuits.remove(name)
            del self._quarantined[name]
            self._yard.remove(name)
            if self._upgrades.current.get(member.family) == name:
                del self._upgrades.current[member.family]

    def _adopt(self, config: Config, read: Config) -> None:
        self._config, self._read = config, read
        self._circuits.judge_by(BreakerRules.of(config.resilience))
        self._alerts.judge_by(config.alerts)
        if self._recovery is not None:
            self._recovery.price_by(Prices(config.ledger))

    def _reload_for(self, asker: Child | None, number: int = 0) -> None:
        """For an API process that was asked to, or for a signal."""
        task = asyncio.create_task(self._reload_and_tell(asker, number), name="reload")
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload_and_tell(self, asker: Child | None, number: int) -> None:
        refused, changed = "", list[str]()
        try:
            changed = await self.reload()
        except (ConfigError, ModelError) as error:
            refused = error.message
            self._log.error("configuration refused", reason=refused, kept="the old one stays in force")
        except asyncio.CancelledError:
            refused = "The server is stopping."
            raise
        else:
            self._log.info("configuration reloaded", changed=changed)
        finally:
            if asker is not None:
                asker.tell(Reloaded(number, changed, refused))

    # Between

    def _hear(self, child: Child, message: ToSupervisor) -> None:
        if isinstance(message, AskLimits):
            # Also of one that died meanwhile: what it leases now lapses once all of it is read.
            pid = child.speaker
            child.tell(LimitsAnswer(message.number, [self._limits.answer(ask, pid) for ask in message.asks]))
        elif isinstance(message, TurnMoves):
            if pid := child.pid:  # else it is what a dead one has left in the socket
                for key, number, move in message.moves:
                    self._turns.hear(pid, key, number, move)
                self._say_turns()
        elif isinstance(message, CircuitCalls | AskProbe | ProbeEnded):
            answer = self._circuits.hear(message, child.pid)
            if answer is not None:
                child.tell(answer)
        elif isinstance(message, ModelInUse | Held):
            self._yard.hear(child, message)
        elif isinstance(message, AskModels):
            task = asyncio.create_task(self._answer(child, message), name=f"models {message.action}")
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        elif isinstance(message, ShadowCompared):
            self._upgrades.hear(message)
        elif isinstance(message, Quarantine):
            if self._quarantined[message.model].add(message.fingerprint, message.until):
                self._tell_apis(message)
        elif isinstance(message, KeyMet):
            self._keys_met.pop(message.digest, None)
            self._keys_met[message.digest] = None
            if len(self._keys_met) > MOST_KEYS_MET:
                del self._keys_met[next(iter(self._keys_met))]
            self._tell_apis(message)
        elif isinstance(message, AskProcesses):
            child.tell(Processes(message.number, self._processes()))
        elif isinstance(message, Quiet):
            self._apis.is_quiet(child)
        elif isinstance(message, AskReload):
            self._reload_for(child, message.number)
        elif isinstance(message, RequestsEnded | BudgetSeen):
            self._alerts.hear(message)
            if isinstance(message, RequestsEnded):
                self._upgrades.hear(message.counts)
        elif isinstance(message, ErrorsNoted):
            self._errors.add(message.errors)

    async def _answer(self, child: Child, asked: AskModels) -> None:
        """What an administrator wants of the models."""
        try:
            answer = ModelsAnswer(asked.number, await self._upgrades.answer(asked))
        except (ModelRefused, ModelNotFound) as error:
            answer = ModelsAnswer(asked.number, refused=error.message, unknown=isinstance(error, ModelNotFound))
        child.tell(answer)

    def _tell_apis(self, message: ToChild) -> None:
        self._apis.tell(message)

    def _say_turns(self) -> None:
        words, self._turn_words = self._turn_words, {}
        for api in self._apis:
            if ours := words.get(api.pid):
                api.tell(TurnWords(ours))

    def _api_changed(self, api: Child) -> None:
        self._yard.api_began(api)
        for family, model in self._upgrades.current.items():
            api.tell(VersionPromoted(family, model))
        for standing in self._circuits.standing():
            api.tell(standing)
        for model, quarantined in self._quarantined.items():
            for print_, until in quarantined.standing():
                api.tell(Quarantine(model, print_, until))
        for digest in self._keys_met:
            api.tell(KeyMet(digest))

    def _api_died(self, pid: int) -> None:
        self._yard.api_died(pid)
        self._limits.lapse(pid)
        self._circuits.lapse(pid)
        self._turns.lapse(pid)
        self._say_turns()
        if self._recovery is not None:
            self._recovery.want()
        for path in self._figures.glob(f"gauge_live*_{pid}.db"):
            path.unlink(missing_ok=True)

    def _bills_recovered(self, rows: list[UsageRow]) -> None:
        """Now it is known what the requests of a dead process used; until now all that they had leased was taken for used."""
        self._limits_recovered([settlement(row) for row in rows])

    def _limits_recovered(self, asks: list[Ask]) -> None:
        if self._config.limits.limits_url == "memory://":
            for ask in asks:
                self._limits.answer(ask)
        else:
            self._owed.add(asks)

    def _engines_down(self) -> list[tuple[str, str | None]]:
        """For the alerts: why each model's engine can't be used. One that is loaded for the first time isn't down."""
        open_circuits = {standing.model for standing in self._circuits.standing() if standing.state != "closed"}
        said: list[tuple[str, str | None]] = []
        for files, status in self._yard.statuses():
            down = status.state == "failed" or (status.state == "starting" and self._yard.residences[files.name].was_ready.is_set())
            reason = status.reason if down else None
            if files.name in open_circuits and status.state == "ready":
                reason = "Its requests failed too often of late, and its circuit breaker keeps them away from it."
            said.append((files.public_name, reason))
        return said

    def _processes(self) -> dict[str, object]:
        workers = self._yard.listings()
        several = self._upgrades.listing() if self._yard.managed else {}
        apis = [line for api in self._apis if (line := listing(api)) is not None]
        return {
            "workers": workers,
            "api": apis,
            **{name: several[name] for name in ("memory", "shadows") if name in several},
            "supervisor": {"pid": os.getpid(), "memory_mib": memory_mib(os.getpid())},
            "version": __version__,
            "uptime_seconds": round(time.monotonic() - self._started_at, 1),
        }

    # End

    async def _stop(self) -> None:
        """Let running requests finish, then end the API processes, then the worker. Each further signal makes it hastier."""
        timeout = self._config.server.drain_timeout
        self._log.info("stopping", drain_timeout=timeout)
        for reload in self._reloads:
            reload.cancel()
        await asyncio.gather(*self._reloads, return_exceptions=True)
        await self._apis.stop(timeout, END_TIMEOUT, self._within, self._close_door)
        if not await self._yard.stop(self._within):
            self._log.warning("engine had to be killed")

    def _close_door(self) -> None:
        let_nobody_in(self._bound)
        self._bound.close()

    async def _within(self, done: asyncio.Future[Any], seconds: float) -> bool:
        """Wait until it is done, the time is over, or another signal comes; whether it is done."""
        hurry = asyncio.ensure_future(self._signalled.wait())
        await asyncio.wait((done, hurry), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        return done.done()
