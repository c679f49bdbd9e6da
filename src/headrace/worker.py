"""The engine worker's process: `python -m headrace.worker CONTROL_FD LISTENING_FD`, started by the supervisor.

Loads one model, serves it to every API process that connects, and reports to the supervisor.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from pathlib import Path
from typing import Protocol, runtime_checkable

import structlog
import uvloop

from headrace import logs
from headrace.config import Config, EngineSection
from headrace.control import Alive, Beginning, Stop, ToChild, begin
from headrace.engine.echo import EchoEngine
from headrace.engine.frames import FrameConnection
from headrace.engine.serving import EngineServer
from headrace.errors import HeadraceError, ModelError
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Engine, Runner
from headrace.stores.slots import SharedSlots
from headrace.types import EngineStats, ModelFiles

REPORT_INTERVAL = 0.25
"""Seconds between reports to the supervisor, while there is something new to say."""
CLOSE_TIMEOUT = 2.0
"""Seconds that an engine gets to close before the process leaves without it."""


def main() -> None:
    """Run until told to stop."""
    beginning = begin()
    logs.configure(beginning.config.log, "engine")
    uvloop.run(_run(beginning))


def build_engine(files: ModelFiles, config: Config, memory_share: float = 1.0) -> Engine:
    """The engine that serves these files, with its part of the memory for keys and values. Raises `ModelError`."""
    if files.kind == "echo":
        return EchoEngine.from_options(
            load_tokenizer(files),
            files.options,
            name=files.name,
            context_length=files.context_length,
            fingerprint=files.fingerprint,
            max_sequences=config.engine.max_sequences,
        )
    if files.kind == "remote":
        from headrace.engine.remote import RemoteEngine

        key = config.model.remote_api_key
        return RemoteEngine(
            files.url,
            name=files.name,
            model=config.model.remote_model,
            api_key=None if key is None else key.get_secret_value(),
            context_length=files.context_length,
            fingerprint=files.fingerprint,
            options=files.options,
        )
    from headrace.engine.scheduled import ScheduledEngine

    return ScheduledEngine(
        lambda: load_runner(files, config.engine, memory_share),
        load_tokenizer(files),
        name=files.name,
        kind=files.kind,
        context_length=files.context_length,
        fingerprint=files.fingerprint,
        config=config.engine,
    )


def load_runner(files: ModelFiles, section: EngineSection, memory_share: float = 1.0) -> Runner:
    """The model on the CPU, loaded. Raises `ModelError`."""
    from headrace.engine.openvino_runner import OpenVinoRunner

    runner = OpenVinoRunner(
        Path(files.folder),
        num_blocks=None,
        kv_bytes=None if section.kv_cache_gib is None else int(section.kv_cache_gib * 2**30),
        context_length=files.context_length,
        max_sequences=section.max_sequences,
        threads=section.threads,
        memory_share=memory_share,
    )
    runner.load()
    return runner


@runtime_checkable
class CanBreak(Protocol):
    """An engine whose loop may break for good; then its process is of no further use."""

    failed: asyncio.Event
    failure: BaseException | None


async def _run(beginning: Beginning) -> None:
    loop = asyncio.get_running_loop()
    log = structlog.get_logger("headrace.worker")
    stopping = asyncio.Event()

    def told(message: ToChild) -> None:
        if isinstance(message, Stop):
            stopping.set()

    control = FrameConnection[ToChild](ToChild, told, _leave)
    await loop.create_unix_connection(lambda: control, sock=beginning.control)
    files = beginning.setup.models[0]
    try:
        engine = build_engine(files, beginning.config, beginning.setup.memory_share)
        server = EngineServer(engine, pid=os.getpid(), open_counters=SharedSlots)
        accepting = await _listen(server, beginning.listening)
        starting = asyncio.create_task(engine.start())
        await asyncio.wait((starting, asyncio.create_task(stopping.wait())), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            os._exit(0)
        card = starting.result()
    except HeadraceError as error:
        control.send(Alive("failed", error.message, fatal=isinstance(error, ModelError)))
        log.error("engine failed to start", reason=error.message)
        await asyncio.sleep(0.05)
        os._exit(3)
    except Exception as error:  # the process's outermost edge
        control.send(Alive("failed", f"{type(error).__name__}: {error}"))
        log.exception("engine failed to start")
        await asyncio.sleep(0.05)
        os._exit(4)
    gc.collect()
    gc.freeze()
    server.ready(card)
    control.send(Alive("ready", stats=engine.stats()))
    await _report(engine, control, stopping)
    if isinstance(engine, CanBreak) and engine.failed.is_set():
        control.send(Alive("failed", f"The engine's loop broke: {engine.failure!r}."))
        await asyncio.sleep(0.05)
        os._exit(5)
    del accepting  # held until here: uvloop closes a server that nobody holds
    control.send(Alive("stopping", stats=engine.stats()))
    try:
        await asyncio.wait_for(engine.close(), CLOSE_TIMEOUT)
    except TimeoutError:
        log.warning("engine closed too slowly")
    os._exit(0)


async def _listen(server: EngineServer, listening: socket.socket) -> asyncio.AbstractServer:
    # The socket is the supervisor's, which keeps it over a worker's death: API processes' connections wait in it.
    return await asyncio.get_running_loop().create_unix_server(server.accept, sock=listening)


async def _report(engine: Engine, control: FrameConnection[ToChild], stopping: asyncio.Event) -> None:
    said: EngineStats | None = None
    watching = None
    if isinstance(engine, CanBreak):
        watching = asyncio.create_task(_wait_then_set(engine.failed, stopping))
    while not stopping.is_set():
        stats = engine.stats()
        if stats != said:
            said = stats
            control.send(Alive("ready", stats=stats))
        try:
            await asyncio.wait_for(stopping.wait(), REPORT_INTERVAL)
        except TimeoutError:
            continue
    if watching is not None:
        watching.cancel()


async def _wait_then_set(first: asyncio.Event, then: asyncio.Event) -> None:
    await first.wait()
    then.set()


def _leave() -> None:
    os._exit(0)


if __name__ == "__main__":
    main()
