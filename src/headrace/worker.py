"""The engine worker's process: `python -m headrace.worker CONTROL_FD LISTENING_FD`, started by the supervisor.

Loads one model, serves it to every API process that connects, and reports to the supervisor.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import structlog
import uvloop

from headrace import logs
from headrace.config import Config, EngineSection
from headrace.control import Alive, Beginning, ErrorsNoted, Promote, Stop, ToChild, begin
from headrace.engine.admission import Admission
from headrace.engine.echo import EchoEngine
from headrace.engine.frames import FrameConnection
from headrace.engine.pulse import Pulse
from headrace.engine.serving import EngineServer
from headrace.engine.step_notes import begin_notes
from headrace.error_tracking import ErrorTracker
from headrace.errors import HeadraceError, ModelError
from headrace.low_priority import give_way
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Engine, Runner
from headrace.stores.slots import SharedSlots
from headrace.types import EngineState, EngineStats, ModelFiles

if TYPE_CHECKING:
    from headrace.engine.torch_load import Wanted
    from headrace.engine.vllm_load import Wanted as WantedOfVllm

REPORT_INTERVAL = 0.25
"""Seconds between reports to the supervisor, while there is something new to say."""
BEAT_INTERVAL = 0.2
"""Seconds between the event loop's marks in the pulse."""
CLOSE_TIMEOUT = 2.0
"""Seconds that an engine gets to close before the process leaves without it."""


def main() -> None:
    """Run until told to stop."""
    beginning = begin()
    logs.configure(beginning.config.log, "engine")
    uvloop.run(_run(beginning))


def build_engine(
    files: ModelFiles, config: Config, memory_share: float = 1.0, *, kv_blocks: int = 0, beside_standby: bool = False
) -> Engine:
    """The engine that serves these files, with its part of the memory for keys and values. Raises `ModelError`.

    `kv_blocks` is how many to allocate, if not 0; else memory is left for another engine like it where it is `beside_standby`.
    """
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
            model=config.model.remote_model or files.options.get("model"),
            api_key=None if key is None else key.get_secret_value(),
            context_length=files.context_length,
            fingerprint=files.fingerprint,
            options={name: value for name, value in files.options.items() if name != "model"},
        )
    if files.kind == "vllm":
        from headrace.engine.vllm_engine import VllmEngine

        wanted = _wanted_of_vllm(files, config, memory_share, beside_standby=beside_standby)
        return VllmEngine(wanted, load_tokenizer(files), name=files.name, fingerprint=files.fingerprint)
    if config.engine.tensor_parallel * config.engine.pipeline_parallel > 1:
        raise ModelError("tensor_parallel and pipeline_parallel need engine = vllm, which needs safetensors and headrace[vllm].")
    from headrace.engine.scheduled import ScheduledEngine

    return ScheduledEngine(
        lambda: load_runner(files, config, memory_share, kv_blocks=kv_blocks, beside_standby=beside_standby),
        lambda: load_tokenizer(files),
        name=files.name,
        kind=files.kind,
        context_length=files.context_length,
        # Other rounding: kept answers of the one mode aren't the other's.
        fingerprint=files.fingerprint + ("-deterministic" if config.engine.deterministic else ""),
        config=config.engine,
    )


def admission_for(files: ModelFiles, config: Config) -> Admission:
    """Who may wait for this engine. An upstream's batch is its own matter; ours is as large as it is configured."""
    if files.kind == "vllm":
        return Admission(config.overload, slots=config.engine.max_sequences)
    ours = files.kind in ("openvino", "transformers", "echo")
    return Admission(config.overload, slots=min(config.engine.max_sequences, config.engine.step_tokens - 1) if ours else 0)


def load_runner(
    files: ModelFiles, config: Config, memory_share: float = 1.0, *, kv_blocks: int = 0, beside_standby: bool = False
) -> Runner:
    """The model on its device, loaded. Raises `ModelError`."""
    section = config.engine
    if files.kind == "transformers":
        from headrace.engine.torch_load import load, quiet

        quiet()
        return load(_wanted(files, config, memory_share, kv_blocks=kv_blocks, beside_standby=beside_standby))
    from headrace.engine.openvino_runner import OpenVinoRunner

    runner = OpenVinoRunner(
        Path(files.folder),
        num_blocks=kv_blocks or None,
        kv_bytes=None if section.kv_cache_gib is None else int(section.kv_cache_gib * 2**30),
        context_length=files.context_length,
        max_sequences=section.max_sequences,
        threads=section.threads,
        memory_share=memory_share,
        beside_another=beside_standby,
        deterministic=section.deterministic,
    )
    runner.load()
    return runner


def _wanted(files: ModelFiles, config: Config, memory_share: float, *, kv_blocks: int, beside_standby: bool) -> Wanted:
    """What the transformers engine is to load."""
    from headrace.engine.torch_load import Wanted
    from headrace.models.as_stored import gguf_settings, weights_of
    from headrace.models.card import read_object

    folder = Path(files.folder)
    gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
    section, model = config.engine, config.model
    return Wanted(
        folder=folder,
        tensors=weights_of(folder),
        config=read_object(folder / "config.json") if gguf is None else gguf_settings(gguf),
        gguf="" if gguf is None else gguf.name,
        context_length=files.context_length,
        max_sequences=section.max_sequences,
        step_tokens=section.step_tokens,
        dtype=model.dtype,
        device=model.device,
        quantize=model.quantize,
        trust_remote_code=model.trust_remote_code,
        threads=section.threads,
        kv_bytes=None if section.kv_cache_gib is None else int(section.kv_cache_gib * 2**30),
        num_blocks=kv_blocks,
        gpu_memory_utilization=section.gpu_memory_utilization,
        memory_share=memory_share,
        beside_another=beside_standby,
        deterministic=section.deterministic,
    )


def _wanted_of_vllm(files: ModelFiles, config: Config, memory_share: float, *, beside_standby: bool) -> WantedOfVllm:
    """What the vllm engine is to load. Raises `ModelError` for what it can't do."""
    from headrace.engine.vllm_load import Wanted as WantedOfVllm

    section, model = config.engine, config.model
    if section.deterministic:
        raise ModelError("deterministic = true is not for the vllm engine: its products are batched. Take engine = openvino.")
    return WantedOfVllm(
        folder=Path(files.folder),
        context_length=files.context_length,
        max_sequences=section.max_sequences,
        step_tokens=None if section.step_tokens == EngineSection().step_tokens else section.step_tokens,
        dtype=model.dtype,
        device=model.device,
        trust_remote_code=model.trust_remote_code,
        threads=section.threads,
        tensor_parallel=section.tensor_parallel,
        pipeline_parallel=section.pipeline_parallel,
        gpu_memory_utilization=section.gpu_memory_utilization,
        kv_bytes=None if section.kv_cache_gib is None else int(section.kv_cache_gib * 2**30),
        memory_share=memory_share,
        beside_another=beside_standby,
        prefix_cache=section.prefix_cache,
    )


@runtime_checkable
class CanBreak(Protocol):
    """An engine whose loop may break for good; then its process is of no further use."""

    failed: asyncio.Event
    failure: BaseException | None


@runtime_checkable
class ShowsPulse(Protocol):
    """An engine whose step loop shows that it gets on."""

    pulse: Pulse


async def _run(beginning: Beginning) -> None:
    loop = asyncio.get_running_loop()
    log = structlog.get_logger("headrace.worker")
    stopping, promoted = asyncio.Event(), asyncio.Event()
    setup = beginning.setup
    # The other worker serves meanwhile.
    hurry = give_way() if setup.standing_by and not setup.in_hurry else lambda: None

    def told(message: ToChild) -> None:
        if isinstance(message, Stop):
            stopping.set()
        elif isinstance(message, Promote):
            hurry()
            promoted.set()

    control = FrameConnection[ToChild](ToChild, told, _leave)
    await loop.create_unix_connection(lambda: control, sock=beginning.control)
    pulse = Pulse.join(setup.pulse) if setup.pulse else Pulse()
    beating = asyncio.create_task(_beat(pulse), name="pulse")
    files = setup.models[0]
    tracker = ErrorTracker("engine", lambda errors: control.send(ErrorsNoted(errors)), model=files.public_name)
    logs.watch(tracker.watch_log)
    try:
        engine = build_engine(files, beginning.config, setup.memory_share, kv_blocks=setup.kv_blocks, beside_standby=setup.beside_standby)
        if isinstance(engine, ShowsPulse):
            engine.pulse = pulse
        server = EngineServer(
            engine,
            pid=os.getpid(),
            open_counters=SharedSlots,
            notes=begin_notes(setup.sockets[0]),
            admission=admission_for(files, beginning.config),
        )
        accepting = asyncio.create_task(_accept(server, beginning.listening, promoted), name="accept")
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
    hurry()
    if not setup.standing_by:
        promoted.set()
    server.ready(card)
    await _report(engine, server, control, stopping, accepting)
    if isinstance(engine, CanBreak) and engine.failed.is_set():
        control.send(Alive("failed", f"The engine's loop broke: {engine.failure!r}."))
        await asyncio.sleep(0.05)
        os._exit(5)
    del accepting, beating  # held until here: uvloop closes a server that nobody holds
    control.send(Alive("stopping", stats=engine.stats()))
    try:
        await asyncio.wait_for(engine.close(), CLOSE_TIMEOUT)
    except TimeoutError:
        log.warning("engine closed too slowly")
    os._exit(0)


async def _beat(pulse: Pulse) -> None:
    while True:
        pulse.beat()
        await asyncio.sleep(BEAT_INTERVAL)


async def _accept(server: EngineServer, listening: socket.socket, promoted: asyncio.Event) -> asyncio.AbstractServer:
    await promoted.wait()
    # The socket is the supervisor's, which keeps it over a worker's death: API processes' connections wait in it.
    return await asyncio.get_running_loop().create_unix_server(server.accept, sock=listening)


async def _report(
    engine: Engine,
    server: EngineServer,
    control: FrameConnection[ToChild],
    stopping: asyncio.Event,
    accepting: asyncio.Task[asyncio.AbstractServer],
) -> None:
    """Tell the supervisor how it goes, until the process has to stop. `accepting` is done once API processes can connect."""
    said: tuple[EngineState, EngineStats] | None = None
    stopped = asyncio.create_task(stopping.wait())
    watching = None
    if isinstance(engine, CanBreak):
        watching = asyncio.create_task(_wait_then_set(engine.failed, stopping))
    while not stopping.is_set():
        serving = accepting.done() and accepting.result() is not None
        state: EngineState = "ready" if serving else "standby"
        # With the requests that are held back before the engine.
        stats = server.stats.stats
        if (state, stats) != said:
            said = state, stats
            control.send(Alive(state, stats=stats))
        await asyncio.wait({stopped} if serving else {stopped, accepting}, timeout=REPORT_INTERVAL, return_when=asyncio.FIRST_COMPLETED)
    if watching is not None:
        watching.cancel()


async def _wait_then_set(first: asyncio.Event, then: asyncio.Event) -> None:
    await first.wait()
    then.set()


def _leave() -> None:
    os._exit(0)


if __name__ == "__main__":
    main()
