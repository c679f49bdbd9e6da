"""Engine clients and engine servers over real unix sockets, in one process."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.address import listen_privately
from headrace.engine.echo import EchoEngine
from headrace.engine.frames import Submit
from headrace.engine.serving import EngineServer
from headrace.engine_streams import MAX_SUBMISSIONS
from headrace.engines import EngineClient
from headrace.errors import BadRequest, ContextLengthExceeded, DeadlineExceeded, EngineDied, EngineUnavailable, RequestFailed
from headrace.models.tokenizer import load_tokenizer
from headrace.ports import Deliver, Engine
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, ModelFiles, Report, Sampling

pytestmark = pytest.mark.anyio

TOKENIZER = load_tokenizer(ModelFiles(name="echo", kind="echo"))


class Worker:
    """What a worker process is to its clients: a socket that stays, and engines that come and go behind it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "engine")
        self.listening = listen_privately(Path(self.path))
        self.server: EngineServer | None = None
        self.engine: Any = None
        self._accepting: asyncio.AbstractServer | None = None
        self.transports: list[asyncio.Transport] = []

    async def live(self, engine: Engine, **more: Any) -> None:
        self.engine = engine
        self.server = server = EngineServer(engine, **{"pid": 1, **more})

        def accept() -> asyncio.Protocol:
            protocol: Any = server.accept()
            made = protocol.connection_made

            def note(transport: Any) -> None:
                self.transports.append(transport)
                made(transport)

            protocol.connection_made = note
            return protocol

        self._accepting = await asyncio.get_running_loop().create_unix_server(accept, sock=self.listening.dup())
        server.ready(await engine.start())

    async def die(self) -> None:
        assert self._accepting is not None
        self._accepting.close()
        for transport in self.transports:
            transport.abort()
        self.transports.clear()
        await self.engine.close()
        # An event loop's server takes its socket's name along; a dead process doesn't.
        if not Path(self.path).exists():
            self.listening.close()
            self.listening = listen_privately(Path(self.path))


@pytest.fixture
async def worker() -> AsyncIterator[Worker]:
    with tempfile.TemporaryDirectory() as folder:
        made = Worker(Path(folder))
        yield made
        if made.engine is not None:
            await made.die()
        made.listening.close()


@pytest.fixture
async def client(worker: Worker) -> AsyncIterator[EngineClient]:
    made = EngineClient(worker.path)
    made.connect()
    yield made
    await made.close()


def ask(text: str = "hello", *, id: str = "r", timeout: float | None = 10, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(id=id, prompt=TOKENIZER.encode(text), sampling=Sampling(max_tokens=1000, **sampling), timeout=timeout)


async def collect(client: Any, request: GenerateRequest) -> list[Event]:
    return [event async for batch in client.generate(request) for event in batch]


def text_of(events: list[Event]) -> str:
    assert isinstance(events[-1], Report)
    return "".join(event.text for event in events if isinstance(event, Delta))


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


class Pulled:
    """An engine without `submit`, as `remote` is."""

    def __init__(self, inner: EchoEngine) -> None:
        self._inner = inner
        self.start, self.generate, self.stats, self.close = inner.start, inner.generate, inner.stats, inner.close


@pytest.mark.parametrize("wrap", [lambda engine: engine, Pulled])
async def test_requests_run_together_and_in_order(worker: Worker, client: EngineClient, wrap: Any) -> None:
    await worker.live(wrap(EchoEngine(TOKENIZER)))
    card = await client.start()
    assert card.kind == "echo"
    texts = [f"text {number} " * 5 for number in range(20)]
    answers = await asyncio.gather(*(collect(client, ask(text, id=str(number))) for number, text in enumerate(texts)))
    assert [text_of(events) for events in answers] == texts
    assert (await client.refresh()).completion_tokens == sum(map(len, texts))
    assert client.stats().running == 0


@pytest.mark.parametrize("wrap", [lambda engine: engine, Pulled])
async def test_closing_cancels_in_the_worker(worker: Worker, client: EngineClient, wrap: Any) -> None:
    engine = EchoEngine(TOKENIZER, pace=0.005)
    await worker.live(wrap(engine))
    async with aclosing(client.generate(ask("x" * 500))) as batches:
        await anext(batches)
        assert engine.stats().running == 1
    await until(lambda: engine.stats().running == 0)
    task = asyncio.create_task(collect(client, ask("x" * 500)))
    await until(lambda: engine.stats().running == 1)
    task.cancel()
    await until(lambda: engine.stats().running == 0)


async def test_two_api_processes_share_a_worker_and_one_that_goes_takes_its_requests_along(worker: Worker, client: EngineClient) -> None:
    engine = EchoEngine(TOKENIZER, pace=0.005)
    await worker.live(engine)
    other = EngineClient(worker.path)
    await other.start()
    # The same ids on both: cancelling one must not reach the other.
    theirs = asyncio.create_task(collect(other, ask("y" * 300)))
    ours = asyncio.create_task(collect(client, ask("z" * 60)))
    await until(lambda: engine.stats().running == 2)
    await other.close()
    await until(lambda: engine.stats().running == 1)
    with pytest.raises(EngineUnavailable):
        await theirs
    assert text_of(await ours) == "z" * 60


async def test_refusals_cross_the_socket_as_they_are(worker: Worker, client: EngineClient) -> None:
    await worker.live(EchoEngine(TOKENIZER, context_length=16))
    with pytest.raises(ContextLengthExceeded, match="16"):
        await collect(client, ask("x" * 17))
    with pytest.raises(BadRequest):
        await collect(client, ask(stop=("\ud800",)))
    assert text_of(await collect(client, ask())) == "hello"


async def test_a_death_is_a_pause(worker: Worker, client: EngineClient) -> None:
    await worker.live(EchoEngine(TOKENIZER, max_sequences=1, pace=0.005))
    begun = asyncio.create_task(collect(client, ask("b" * 300, id="begun")))
    await until(lambda: worker.engine.stats().running == 1)
    queued = asyncio.create_task(collect(client, ask("queued", id="queued")))
    await until(lambda: worker.engine.stats().waiting == 1)
    await until(lambda: worker.engine.stats().completion_tokens > 5)
    await worker.die()
    await until(lambda: not client.ready)
    late = asyncio.create_task(collect(client, ask("late", id="late")))
    await asyncio.sleep(0)
    assert client.waiting == 3
    await worker.live(EchoEngine(TOKENIZER))
    whole = await begun
    assert text_of(whole) == "b" * 300
    assert [event.index for event in whole if isinstance(event, Delta)] == [*range(300)]
    assert isinstance(whole[-1], Report)
    assert (whole[-1].prompt_tokens, whole[-1].completion_tokens) == (300, 300)
    assert worker.engine.stats().completion_tokens < 310
    assert text_of(await queued) == "queued"
    assert text_of(await late) == "late"


class Silent:
    """Takes requests and never answers."""

    async def start(self) -> EngineCard:
        return EngineCard(model="silent", kind="echo", context_length=99, vocab_size=1, fingerprint="")

    def generate(self, request: GenerateRequest) -> Any:
        raise NotImplementedError

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        self.seen = getattr(self, "seen", 0) + 1

    def cancel(self, request_id: str) -> None:
        pass

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None:
        pass


async def test_a_request_that_saw_many_workers_die_is_ended(worker: Worker, client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, ask()))
    for _ in range(MAX_SUBMISSIONS):
        await worker.live(Silent())
        await until(lambda: getattr(worker.engine, "seen", 0))
        await worker.die()
    with pytest.raises(EngineDied):
        await task


async def test_waiting_ends_with_the_deadline(client: EngineClient, worker: Worker) -> None:
    with pytest.raises(DeadlineExceeded, match="not ready"):
        await collect(client, ask(timeout=0.02))
    impatient = EngineClient(worker.path, patience=0.02)
    with pytest.raises(EngineUnavailable):
        await collect(impatient, ask(timeout=None))
    assert client.waiting == impatient.waiting == 0


async def test_a_worker_that_hangs_does_not_hold_a_request_beyond_its_deadline(
    worker: Worker, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("headrace.engines.GRACE", 0.02)
    await worker.live(Silent())
    with pytest.raises(DeadlineExceeded):
        await collect(client, ask(timeout=0.02))


async def test_what_waited_has_less_time_left(worker: Worker, client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, ask("x" * 500, timeout=0.15)))
    await asyncio.sleep(0.05)
    await worker.live(EchoEngine(TOKENIZER, pace=0.005))
    with pytest.raises(DeadlineExceeded, match=r"than its 0\.[01]\d* s: "):
        await task


async def test_given_up_and_hoped_again(worker: Worker, client: EngineClient) -> None:
    waiting = asyncio.create_task(collect(client, ask()))
    await asyncio.sleep(0)
    client.give_up(EngineUnavailable("It won't load."))
    for request in (waiting, collect(client, ask())):
        with pytest.raises(EngineUnavailable, match="won't load"):
            await request
    client.hope()
    await worker.live(EchoEngine(TOKENIZER))
    assert text_of(await collect(client, ask())) == "hello"


async def test_end_all_is_final(worker: Worker, client: EngineClient) -> None:
    await worker.live(EchoEngine(TOKENIZER, pace=0.01))
    async with aclosing(client.generate(ask("x" * 100))) as batches:
        await anext(batches)
        client.end_all(EngineUnavailable("Stopping."))
        with pytest.raises(EngineUnavailable, match="Stopping"):
            await asyncio.wait_for(_exhaust(batches), 2)
    with pytest.raises(EngineUnavailable, match="Stopping"):
        await collect(client, ask())


async def _exhaust(batches: Any) -> None:
    async for _ in batches:
        pass


class Broken(Silent):
    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        if request.id == "bad":
            raise ZeroDivisionError
        deliver([Report(1, 0, 0, 0, 0, 0)])


async def test_an_error_belongs_to_one_request(worker: Worker, client: EngineClient) -> None:
    await worker.live(Broken())
    with pytest.raises(RequestFailed, match="ZeroDivisionError"):
        await collect(client, ask(id="bad"))
    assert len(await collect(client, ask(id="good"))) == 1


async def test_a_client_that_does_not_read_is_cut_off(worker: Worker, client: EngineClient) -> None:
    engine = EchoEngine(TOKENIZER, context_length=10**6)
    await worker.live(engine, max_unread=10_000)
    _reader, writer = await asyncio.open_unix_connection(worker.path, limit=1024)
    for handle in range(1, 30):
        request = GenerateRequest(id=f"h{handle}", prompt=[97], sampling=Sampling(max_tokens=10**5, ignore_eos=True))
        frame = msgspec.msgpack.encode(Submit(handle, request))
        writer.write(len(frame).to_bytes(4, "big") + frame)
    await until(lambda: engine.stats().running == 29)
    # The other client is served all the while.
    assert text_of(await collect(client, ask())) == "hello"
    await until(lambda: engine.stats().running == 0)
    writer.close()


async def test_what_is_handed_over_is_not_read_and_nothing_overtakes(worker: Worker, client: EngineClient) -> None:
    await worker.live(EchoEngine(TOKENIZER, pace=0.001))
    await client.start()
    text = "to be handed over, as far as it can be " * 8
    got: list[Event] = []
    taken = 0

    def take(batch: list[Event]) -> bool:
        nonlocal taken
        if len(got) % 3 == 0:  # now and then it is busy
            return False
        got.extend(batch)
        taken += 1
        return True

    async with aclosing(client.generate(ask(text))) as reading:
        async for batch in reading:
            got += batch
            reading.hand_to(take)
    assert text_of(got) == text
    assert [event.index for event in got if isinstance(event, Delta)] == list(range(len(text)))
    assert taken > len(text) / 3


@pytest.mark.parametrize("error", [None, ZeroDivisionError("of whoever takes")])
async def test_who_takes_no_more_ends_the_request(worker: Worker, client: EngineClient, error: Exception | None) -> None:
    await worker.live(EchoEngine(TOKENIZER, pace=0.001))
    await client.start()
    reading = client.generate(ask("x" * 500))
    got = await anext(reading)

    def take(batch: list[Event]) -> bool:
        got.extend(batch)
        if len(got) == 5:
            reading.stop(error)
        return True

    reading.hand_to(take)
    if error is None:
        assert [batch async for batch in reading] == []
    else:
        with pytest.raises(ZeroDivisionError):
            await anext(reading)
    assert len(got) == 5
    await reading.aclose()
    await until(lambda: worker.engine.stats().running == 0)
    with pytest.raises(StopAsyncIteration):
        await anext(reading)
