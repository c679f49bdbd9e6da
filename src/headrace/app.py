"""An API process: `python -m headrace.app CONTROL_FD LISTENING_FD`, started by the supervisor.

Builds what answers requests (models, tokenizers, clients of the engine workers, the journey, the HTTP application) and
serves it on the listening socket, which all API processes share. The model itself is never loaded here.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import itertools
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
import uvicorn
import uvloop

from headrace import huge_pages, logs
from headrace.claims import Ask, Claim, Reply
from headrace.config import Config, ModelEntry
from headrace.control import (
    Alive,
    AskLimits,
    AskModels,
    AskProbe,
    AskProcesses,
    AskReload,
    Beginning,
    BudgetSeen,
    CircuitCalls,
    CircuitChanged,
    CloseDoor,
    Drain,
    EngineChanged,
    ErrorsNoted,
    Held,
    Hold,
    KeyMet,
    LimitsAnswer,
    ModelInUse,
    ModelKnown,
    ModelRefusal,
    ModelsAction,
    ModelsAnswer,
    ProbeAnswer,
    ProbeEnded,
    Processes,
    Quarantine,
    Quiet,
    Release,
    Reloaded,
    RequestsEnded,
    ServedHere,
    ShadowCompared,
    ToChild,
    TurnMoves,
    TurnWords,
    VersionPromoted,
    begin,
)
from headrace.engine.frames import FrameConnection
from headrace.engines import EngineClient
from headrace.error_tracking import ErrorTracker
from headrace.errors import ConfigError, ConfigRefused, EngineUnavailable, HeadraceError, ModelNotFound, ModelRefused, revive
from headrace.http.api import create_api
from headrace.http.leaving import LAST_CALL, LeavingServer
from headrace.http.request_tally import RequestTally
from headrace.http.slow_readers import Connection, SlowReaders, hold_little
from headrace.journey import Journey
from headrace.models.template import load_template
from headrace.models.tokenizer import load_tokenizer
from headrace.policies.alert_rules import AlertRules
from headrace.policies.budget_watch import BudgetWatch
from headrace.policies.callers import Callers
from headrace.policies.circuit import Circuit
from headrace.policies.claimants import Claimants
from headrace.policies.key_desk import KeyDesk
from headrace.policies.limit_requests import LimitRequests
from headrace.policies.prices import Prices
from headrace.policies.trace import Trace
from headrace.policies.turn_table import TurnMove
from headrace.policies.turns import Turns
from headrace.ports import Ledger, Meters
from headrace.replicas import Replicas
from headrace.served import ServedModel, ServedModels
from headrace.stores.bookkeeper import Bookkeeper
from headrace.stores.cache_open import open_cache
from headrace.stores.data_dir import journal_folder
from headrace.stores.errors_sql import SqlErrors
from headrace.stores.ledger_sql import SqlLedger
from headrace.stores.limits_open import open_limits
from headrace.stores.limits_owed import OWED
from headrace.stores.opening import open_stores
from headrace.stores.sql_keys import SqlKeys
from headrace.tls import ServerTls
from headrace.tracing import Tracing
from headrace.types import EngineCard, EngineStatus, ModelFiles
from headrace.words_later import WordsLater

Client = EngineClient | Replicas

FAREWELL = 2.0
"""Seconds between ending what still runs and leaving, in which clients are told."""
KEEP_ALIVE = 75
"""Seconds that an idle connection stays open; longer than clients' pools keep theirs, so that none closes under a request."""
PS_TIMEOUT = 2.0
TRACES_TIMEOUT = 2.0
"""Seconds at the end for spans that are still to be sent."""
OPEN_CACHE = 1.0
"""Seconds that a start waits for the cache's second level."""
REQUESTS_TOLD = 1.0
"""Seconds between reports of requests to the supervisor, which is for alerts."""
SETTLED = 3.0
"""Seconds after its start when an API process puts its heap into huge pages: what the first requests make is there by then, and the engine
has begun, which is in more of a hurry."""
CERTIFICATE_INTERVAL = 1.0
"""Seconds between looks at the certificate's files."""


def main() -> None:
    """Run until told to drain."""
    beginning = begin()
    logs.configure(beginning.config.log, "api")
    uvloop.run(_run(beginning))


class SupervisorLink:
    """The API process's end of the control socket; what the HTTP floor knows as its control."""

    def __init__(self, models: dict[str, tuple[ServedModel, Client]], started_at: float) -> None:
        self.draining = self.leaving = self.refusing = False
        self.started_at = started_at
        self.server: LeavingServer | None = None
        self.connection = FrameConnection[ToChild](ToChild, self._received, _leave)
        self._models = models
        self.served: ServedModels | None = None
        self.callers: Callers | None = None
        self.bringing: dict[str, WordsLater] = {}
        """By model, who loads its words when they are first needed."""
        self._models_asked: dict[int, asyncio.Future[ModelsAnswer]] = {}
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._limits_asked: dict[int, asyncio.Future[list[Reply]]] = {}
        self._circuits: dict[str, Circuit] = {}
        self.turns: Turns | None = None
        self._probes: dict[int, tuple[str, asyncio.Future[int | None]]] = {}
        self._numbers = itertools.count(1)
        self._reloads: dict[int, asyncio.Future[Reloaded]] = {}
        self._door_closed = asyncio.Event()
        self._ending: asyncio.TimerHandle | None = None
        self._goodbye: asyncio.Task[None] | None = None

    async def ps(self) -> dict[str, Any]:
        """The supervisor's process list. Raises `EngineUnavailable` if it doesn't answer."""
        number = next(self._numbers)
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            self.connection.send(AskProcesses(number))
            return await asyncio.wait_for(answer, PS_TIMEOUT)
        except TimeoutError:
            raise EngineUnavailable("The supervisor did not answer.", retry_after=1) from None
        finally:
            del self._asked[number]

    async def reload(self) -> list[str]:
        """Have the supervisor read the configuration again; what changed. Raises `ConfigRefused`."""
        number = next(self._numbers)
        answer: asyncio.Future[Reloaded] = asyncio.get_running_loop().create_future()
        self._reloads[number] = answer
        try:
            self.connection.send(AskReload(number))
            said = await answer
        finally:
            del self._reloads[number]
        if said.refused:
            raise ConfigRefused(said.refused)
        return said.changed

    async def models(self, action: ModelsAction, model: str = "", watch: float | None = None) -> dict[str, Any]:
        """`http.serving.ControlsModels`."""
        number = next(self._numbers)
        answer: asyncio.Future[ModelsAnswer] = asyncio.get_running_loop().create_future()
        self._models_asked[number] = answer
        try:
            self.connection.send(AskModels(number, action, model, watch))
            said = await answer
        finally:
            del self._models_asked[number]
        if said.refused:
            raise ModelNotFound(said.refused, param="model") if said.unknown else ModelRefused(said.refused)
        return said.said

    def wanted(self, model: str) -> None:
        """There is a request for that model here."""
        self.connection.send(ModelInUse(model, True))

    def maybe_idle(self, model: str) -> None:
        """There may be no request for that model here any more."""
        bringing = self.bringing.get(model)
        if not self._models[model][1].in_use and not (bringing is not None and bringing.in_use):
            self.connection.send(ModelInUse(model, False))

    def shadowed(self, model: str, shadow: str, likeness: float) -> None:
        """A copy of a request was answered."""
        self.connection.send(ShadowCompared(model, shadow, likeness))

    async def ask_limits(self, asks: Sequence[Ask]) -> list[Reply]:
        """A reply to each, from the supervisor's table of limits. It doesn't fail: this process leaves with the supervisor."""
        number = next(self._numbers)
        answer: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()
        self._limits_asked[number] = answer
        self.connection.send(AskLimits(number, list(asks)))
        return await answer

    def circuit(self, served: ServedModel) -> Circuit:
        """The model's circuit breaker, which the supervisor keeps for all processes."""
        name = served.files.name
        made = self._circuits[name] = Circuit(name, served.public_name, self)
        return made

    def report(self, model: str, epoch: int, calls: int, failures: int) -> None:
        """`policies.circuit.CircuitPlace`, as are the next two."""
        self.connection.send(CircuitCalls(model, epoch, calls, failures))

    async def probe(self, model: str) -> int | None:
        number = next(self._numbers)
        answer: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._probes[number] = model, answer
        self.connection.send(AskProbe(number, model))
        return await answer

    def probed(self, model: str, number: int, succeeded: bool | None) -> None:
        self.connection.send(ProbeEnded(model, number, succeeded))

    def tell_turns(self, moves: list[tuple[bytes, int, TurnMove]]) -> None:
        """Of answers that other processes may be asked for, too."""
        self.connection.send(TurnMoves(moves))

    def budget_seen(self, claim: Claim, spent: int) -> None:
        """A budget is nearly spent, or isn't any more."""
        if claim.budget is not None:
            self.connection.send(BudgetSeen(claim.subject, claim.budget, spent, claim.period))

    def engine_ready(self, model: str, card: EngineCard) -> None:
        """The model's worker said hello to us."""
        served, client = self._models[model]
        served.card = card
        if isinstance(client, Replicas):
            client.one_is_ready()

    def engine_lost(self, model: str) -> None:
        """The connection ended; the supervisor will say more, or has done so already."""
        served, client = self._models[model]
        if served.status.state != "ready" or served.status.pid != client.worker_pid or isinstance(client, Replicas):
            return
        served.status = msgspec.structs.replace(
            served.status, state="starting", pid=0, reason="The engine's process ended; it is being started again."
        )

    def _received(self, message: ToChild) -> None:
        if isinstance(message, LimitsAnswer):
            answer = self._limits_asked.pop(message.number)
            if not answer.done():
                answer.set_result(message.replies)
        elif isinstance(message, TurnWords):
            if self.turns is not None:
                for key, number, word in message.words:
                    self.turns.hear(key, number, word)
        elif isinstance(message, CircuitChanged):
            self._circuit_changed(message)
        elif isinstance(message, ProbeAnswer):
            self._probe_answered(message)
        elif isinstance(message, EngineChanged):
            self._engine_changed(message.model, message.status)
        elif isinstance(message, Quarantine):
            if message.model in self._models:
                self._models[message.model][1].quarantine(message.fingerprint, message.until)
        elif isinstance(message, KeyMet):
            if self.callers is not None:
                self.callers.meet(message.digest)
        elif isinstance(message, Hold | Release | ModelKnown | ModelRefusal | VersionPromoted | ModelsAnswer):
            self._hear_of_models(message)
        elif isinstance(message, Processes):
            asked = self._asked.get(message.number)
            if asked is not None and not asked.done():
                asked.set_result(message.listing)
        elif isinstance(message, Reloaded):
            reload = self._reloads.get(message.number)
            if reload is not None and not reload.done():
                reload.set_result(message)
        elif isinstance(message, Drain):
            self._drain(message)
        elif isinstance(message, CloseDoor):
            self._door_closed.set()

    def _hear_of_models(self, message: Hold | Release | ModelKnown | ModelRefusal | VersionPromoted | ModelsAnswer) -> None:
        if isinstance(message, ModelsAnswer):
            asked = self._models_asked.get(message.number)
            if asked is not None and not asked.done():
                asked.set_result(message)
            return
        if isinstance(message, VersionPromoted):
            if self.served is not None:
                self.served.promote(message.family, message.model)
            return
        name = message.files.name if isinstance(message, ModelKnown) else message.model
        if name not in self._models:
            if isinstance(message, Hold):  # one that came with another configuration
                self.connection.send(Held(name, message.number, True))
            return
        served, client = self._models[name]
        bringing = self.bringing.get(name)
        if isinstance(message, Hold):
            if message.gently and (client.in_use or (bringing is not None and bringing.in_use)):
                self.connection.send(Held(name, message.number, False))
            else:
                held = Held(name, message.number, True)
                client.pause(lambda: self.connection.send(held))
        elif isinstance(message, Release):
            client.unpause()
        elif isinstance(message, ModelKnown):
            if bringing is not None and served.files.pending:
                bringing.known(message.files)
        else:
            error = revive(message.code, message.reason, retry_after=None if message.code == "model_too_large" else 10)
            if bringing is not None:
                bringing.failed(error)
            client.fail_waiting(error)

    def _engine_changed(self, model: str, status: EngineStatus) -> None:
        if model not in self._models:
            return  # one that came with another configuration
        served, client = self._models[model]
        served.status = status
        client.not_loaded = status.reason.rstrip(".") if status.state in ("absent", "loading") else ""
        if status.state == "failed":
            client.give_up(EngineUnavailable(status.reason, retry_after=30))
        else:
            client.hope()
        if status.state == "ready" and isinstance(client, EngineClient):
            client.expect(status.pid)

    def _circuit_changed(self, message: CircuitChanged) -> None:
        if message.model not in self._models:
            return
        self._models[message.model][0].circuit = message.state
        circuit = self._circuits.get(message.model)
        if circuit is not None:
            circuit.changed(message.state, message.epoch, message.wait)

    def _probe_answered(self, message: ProbeAnswer) -> None:
        model, answer = self._probes.pop(message.number)
        if not answer.done():
            answer.set_result(message.probe)
        elif message.probe is not None:  # whoever asked has hung up meanwhile
            self.probed(model, message.probe, None)

    def _drain(self, order: Drain) -> None:
        """Leave; a further order only changes the time."""
        if self._ending is not None:
            self._ending.cancel()
        self._ending = asyncio.get_running_loop().call_later(order.timeout, self._end)
        if not order.replaced:
            self.draining = True
        if self.leaving:
            return
        self.leaving = True
        if self.server is None:
            _leave()
        elif order.replaced:
            self.server.leave()
            self.connection.send(Quiet())
        else:
            last_call = min(LAST_CALL, order.timeout)
            self._goodbye = asyncio.create_task(self.server.say_goodbye(last_call, self._refuse, self._quiet), name="goodbye")

    def _refuse(self) -> None:
        self.refusing = True

    async def _quiet(self) -> None:
        """Nothing runs here any more; returns when no other process of the server has anything running either."""
        self.connection.send(Quiet())
        await self._door_closed.wait()

    def _end(self) -> None:
        error = EngineUnavailable("The server is stopping, and the time for running requests is over.", retry_after=5)
        error.leaving = True
        for _, client in self._models.values():
            client.end_all(error)
        asyncio.get_running_loop().call_later(FAREWELL, _leave)


class SupervisorsLimits:
    """`stores.shared_limits.LimitPlace`: `memory://` is in the supervisor, which all API processes share."""

    def __init__(self, link: SupervisorLink) -> None:
        self.exchange = link.ask_limits

    async def tell(self, asks: Sequence[Ask]) -> None:
        await self.exchange(asks)

    async def reconnect(self) -> None:
        """There is nothing to do: it is never away."""

    async def close(self) -> None:
        """There is nothing to let go of."""


async def _run(beginning: Beginning) -> None:
    setup, config = beginning.setup, beginning.config
    models: dict[str, tuple[ServedModel, Client]] = {}
    link = SupervisorLink(models, setup.started_at)
    tracker = ErrorTracker("api", lambda errors: link.connection.send(ErrorsNoted(errors)))
    logs.watch(tracker.watch_log)
    try:
        database, pepper = open_stores(config.store)
        cache = open_cache(config)
        ledger = SqlLedger(database) if config.ledger.ledger == "on" else None
        books = None if ledger is None else open_books(ledger, config)
        several: Sequence[ServedHere | None] = setup.served or [None] * len(setup.models)
        for files, path, here in zip(setup.models, setup.sockets, several, strict=True):
            models[files.name] = _serve_model(files, path, link, books, config, here)
        place, journals = SupervisorsLimits(link), journal_folder(config.store)
        owner, owed = ("", None) if books is None else (books.writer, Path(books.path).with_name(OWED))
        limits = open_limits(
            config.limits.limits_url, place, ledger=ledger, processes=config.server.max_workers, journals=journals, owed=owed, owner=owner
        )
        tls = ServerTls(config.tls) if config.tls.tls_cert is not None else None
    except HeadraceError as error:
        structlog.get_logger("headrace.app").error("API process failed to start", reason=error.message)
        await _connect(link, beginning)
        link.connection.send(Alive("failed", error.message, fatal=True))
        await asyncio.sleep(0.05)
        os._exit(3)
    if books is not None:
        books.told = lambda row: limits.correct(row.id, row.prompt_tokens + row.completion_tokens)
        books.start()
    for _, client in models.values():
        client.connect()
    served = ServedModels([model for model, _ in models.values()], current=setup.current, aliases=config.fleet.aliases)
    link.served = served
    circuits = {model.files.name: link.circuit(model) for model in served} if config.resilience.breaker == "on" else None
    rules = AlertRules.of(config.alerts)
    tally = RequestTally(served, rules.queue_seconds)
    limits.budget_seen = BudgetWatch(rules, link.budget_seen, time.time).seen
    keys = SqlKeys(database)
    callers = link.callers = Callers(config.access, keys, pepper, on_met=lambda digest: link.connection.send(KeyMet(digest)))
    if cache is not None and config.server.max_workers > 1:
        link.turns = Turns(link.tell_turns, cache)
    claimants = Claimants(config.limits.anonymous_limit, beyond_loopback=beyond_loopback(beginning.listening))
    tracing = None if config.trace.otel_endpoint is None else Tracing(config.trace)
    app = create_api(
        config,
        served,
        Journey.standard(
            config,
            served,
            callers=callers,
            answers=cache,
            turns=link.turns,
            limits=limits,
            claimants=claimants,
            books=books,
            circuits=circuits,
            trace=None if tracing is None else Trace(tracing.tracer, served),
            shadowed=link.shadowed if any(alias.shadow for alias in config.fleet.aliases.values()) else None,
        ),
        control=link,
        callers=callers,
        desk=KeyDesk(keys, keys, pepper),
        cache=cache,
        ledger=ledger,
        books=books,
        errors=SqlErrors(database),
        tracker=tracker,
        tally=tally,
        limits=LimitRequests(claimants, limits),
    )
    uvicorn_config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=True,
        timeout_keep_alive=KEEP_ALIVE,
    )
    if tls is not None:
        uvicorn_config.load()
        uvicorn_config.ssl = tls.context
    server = link.server = LeavingServer(uvicorn_config)
    slow = SlowReaders(config.server.slow_client_timeout, server.server_state.connections)
    server.background.append(asyncio.create_task(slow.run(), name="slow readers"))
    hold_little(beginning.listening)
    if tls is not None:
        server.background.append(asyncio.create_task(_watch_certificate(tls), name="certificate"))
    server.background.append(asyncio.create_task(_tell_of_requests(link, tally, rules), name="request counts"))
    await _connect(link, beginning)
    if cache is not None:
        await cache.open(OPEN_CACHE)
    serving = asyncio.create_task(server.serve(sockets=[beginning.listening]))
    await asyncio.wait((serving, asyncio.create_task(server.listening.wait())), return_when=asyncio.FIRST_COMPLETED)
    gc.collect()
    gc.freeze()
    # Requests leave no cycles behind: looking for them every 700 objects costs 4 % of a cached answer.
    gc.set_threshold(20_000, 20, 20)
    link.connection.send(Alive("ready"))
    server.background.append(asyncio.create_task(_settle(), name="huge pages"))
    await serving
    traced = None if tracing is None else asyncio.create_task(tracing.close(TRACES_TIMEOUT))
    if books is not None:
        await books.close_books()
    await limits.close()
    if cache is not None:
        await cache.close()
    for _, client in models.values():
        await client.close()
    if traced is not None:
        await traced
    tracker.flush()
    os._exit(0)


def beyond_loopback(listening: socket.socket) -> bool:
    """Whether other machines can reach it."""
    return not ipaddress.ip_address(listening.getsockname()[0].partition("%")[0]).is_loopback


async def _tell_of_requests(link: SupervisorLink, tally: RequestTally, rules: AlertRules) -> None:
    while True:
        await asyncio.sleep(min(REQUESTS_TOLD, rules.window / 40))
        counts = tally.taken()
        if counts:
            link.connection.send(RequestsEnded(counts))


async def _settle() -> None:
    await asyncio.sleep(SETTLED)
    await asyncio.to_thread(huge_pages.gather)


async def _watch_certificate(tls: ServerTls) -> None:
    log = structlog.get_logger("headrace.tls")
    said = ""
    while True:
        await asyncio.sleep(CERTIFICATE_INTERVAL)
        try:
            if await asyncio.to_thread(tls.reload):
                log.info("certificate read again")
            said = ""
        except ConfigError as error:
            if error.message != said:
                log.warning("the old certificate goes on", reason=error.message)
            said = error.message


def open_books(ledger: Ledger, config: Config) -> Bookkeeper:
    """This process's hand in the ledger. Raises `ConfigError` where the data folder won't have what it writes there."""
    folder = journal_folder(config.store)
    try:
        return Bookkeeper(ledger, folder, Prices(config.ledger))
    except OSError as error:
        raise ConfigError(f"{folder} can't be used: {error.strerror or error}. Bills are kept there while the database is away.") from error


def _serve_model(
    files: ModelFiles, path: str, link: SupervisorLink, meters: Meters | None, config: Config, here: ServedHere | None
) -> tuple[ServedModel, Client]:
    """`here` is None where one model is served; else models are loaded and unloaded, and their words come when they are needed."""
    name = files.name

    def client_of(path: str) -> EngineClient:
        return EngineClient(
            path,
            on_ready=lambda card: link.engine_ready(name, card),
            on_lost=lambda: link.engine_lost(name),
            meters=meters,
            quarantine_seconds=config.resilience.quarantine_seconds,
            on_quarantine=lambda print_, until: link.connection.send(Quarantine(name, print_, until)),
            on_wanted=None if here is None else lambda: link.wanted(name),
            on_idle=None if here is None else lambda: link.maybe_idle(name),
        )

    client: Client = client_of(path)
    if here is not None and here.replicas:
        client = Replicas([client_of(each) for each in (path, *here.replicas)])
    if here is None:
        if files.kind == "remote":
            return ServedModel(files, client), client
        return ServedModel(files, client, load_tokenizer(files), load_template(files)), client
    served = ServedModel(files, client, family=here.family, entry=ModelEntry.model_validate_json(here.entry) if here.entry else None)
    bring = link.bringing[name] = WordsLater(served, lambda: link.wanted(name), lambda: link.maybe_idle(name))
    if files.pending or files.kind != "remote":
        served.bring = bring
    return served, client


async def _connect(link: SupervisorLink, beginning: Beginning) -> None:
    await asyncio.get_running_loop().create_unix_connection(lambda: link.connection, sock=beginning.control)


def _leave() -> None:
    os._exit(0)


if __name__ == "__main__":
    main()
