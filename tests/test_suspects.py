"""Requests that kill engines, among others that don't: who is suspected, who runs alone, who is convicted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.engine.echo import EchoEngine
from headrace.engine.step_notes import LastStep, NotedSteps, begin_notes, digest, notes_path, read_last_step
from headrace.engine.suspects import Turns
from headrace.engine_streams import MAX_SUBMISSIONS
from headrace.engines import EngineClient
from headrace.errors import EngineUnavailable, HeadraceError, RequestQuarantined
from headrace.quarantine import Quarantine, fingerprint
from headrace.types import Delta, Event, GenerateRequest, Report, Resume, Sampling
from test_engines import TOKENIZER, Silent, Worker, ask, collect, text_of, until

pytestmark = pytest.mark.anyio


class Died(Exception):
    pass


class Mortal(EchoEngine):
    """Stops for good in a step that a request with `poison` is in, once it has made so many tokens of it."""

    def __init__(self, *, poison: str = "☠", at: int = 0, **more: Any) -> None:
        super().__init__(TOKENIZER, **more)
        self.dead = asyncio.Event()
        self._poison = TOKENIZER.encode(poison)[-1] if poison else -1
        self._at = at

    def _note(self, fresh: list[str]) -> None:
        super()._note(fresh)
        if any(self._poison in sequence.job.request.prompt and sequence.index >= self._at for sequence in self._running):
            self.dead.set()
            raise Died

    def _step(self) -> None:
        if not self.dead.is_set():
            with contextlib.suppress(Died):
                super()._step()


class Lives:
    """A worker that is replaced whenever its engine stops."""

    def __init__(self, worker: Worker, **engine: Any) -> None:
        self.worker = worker
        self.deaths = 0
        self._made = engine

    async def keep(self) -> None:
        for pid in itertools.count(2):
            engine = Mortal(**self._made)
            await self.worker.live(engine, pid=pid, notes=NotedSteps(notes_path(self.worker.path, pid)))
            await engine.dead.wait()
            self.deaths += 1
            assert self.worker.server is not None
            self.worker.server._turns.notes = None  # the dead write no more
            await self.worker.die()


@asynccontextmanager
async def lives(*clients: Any, **engine: Any) -> AsyncIterator[Lives]:
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        made = Lives(worker, **engine)
        keeper = asyncio.create_task(made.keep())
        try:
            yield made
        finally:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
            await worker.die()
            worker.listening.close()


@asynccontextmanager
async def client_of(made: Lives, **more: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(made.worker.path, **more)
    client.connect()
    yield client
    await client.close()


def indices(events: list[Event]) -> list[int]:
    return [event.index for event in events if isinstance(event, Delta)]


@pytest.mark.parametrize("at", [0, 3])
async def test_a_request_that_kills_is_found_and_all_others_finish(at: int) -> None:
    """Also one that kills only after some tokens: it is out after those, and one death more."""
    told: list[tuple[bytes, float]] = []
    async with lives(at=at, pace=0.002) as made, client_of(made, on_quarantine=lambda *entry: told.append(entry)) as client:
        await client.start()
        good = [asyncio.create_task(collect(client, ask(f"{number}" * 120, id=f"good-{number}"))) for number in range(6)]
        await until(lambda: made.worker.engine.stats().completion_tokens > 30)
        bad = ask("☠ is poison", id="bad")
        with pytest.raises(RequestQuarantined, match="refused for 3600 s"):
            await collect(client, bad)
        assert made.deaths == (3 if at == 0 else 4)
        for number, task in enumerate(good):
            events = await task
            assert text_of(events) == f"{number}" * 120
            assert indices(events) == [*range(120)]
        # The same once more, under another name: no engine sees it.
        with pytest.raises(RequestQuarantined):
            await collect(client, ask("☠ is poison", id="worse"))
        assert made.deaths == (3 if at == 0 else 4)
        assert [print_ for print_, _ in told] == [fingerprint(bad)]
        assert (client.quarantined.convictions, len(client.quarantined)) == (1, 1)
        # Another one is another one.
        assert text_of(await collect(client, ask("is no poison", id="other"))) == "is no poison"


async def test_several_api_processes(tmp_path: Path) -> None:
    """A suspect of one runs alone though the other has requests, and the other learns of the conviction."""
    async with lives(pace=0.002) as made:
        clients: list[EngineClient] = []

        def tell(print_: bytes, until: float) -> None:
            for client in clients:
                client.quarantine(print_, until)

        async with client_of(made, on_quarantine=tell) as one, client_of(made, on_quarantine=tell) as two:
            clients += [one, two]
            await asyncio.gather(one.start(), two.start())
            good = [
                asyncio.create_task(collect(client, ask("g" * 150, id=f"{name}{number}")))
                for name, client in (("one", one), ("two", two))
                for number in range(3)
            ]
            with pytest.raises(RequestQuarantined):
                await collect(one, ask("☠", id="bad"))
            with pytest.raises(RequestQuarantined):
                await collect(two, ask("☠", id="bad"))
            assert made.deaths == 3
            for task in good:
                events = await task
                assert text_of(events) == "g" * 150
                assert indices(events) == [*range(150)]


async def test_who_gets_on_between_deaths_is_never_blamed() -> None:
    async with lives(poison="", pace=0.001) as made, client_of(made) as client:
        await client.start()
        streams = [asyncio.create_task(collect(client, ask(f"{number}" * 400, id=f"{number}"))) for number in range(4)]
        for _ in range(12):
            seen = made.worker.engine
            await until(lambda seen=seen: seen.stats().completion_tokens > 12 or all(task.done() for task in streams))
            seen.dead.set()
            await until(lambda seen=seen: made.worker.engine is not seen)
            await client.start()
        for number, task in enumerate(streams):
            events = await task
            assert text_of(events) == f"{number}" * 400
            assert indices(events) == [*range(400)]
            assert isinstance(events[-1], Report)
            assert (events[-1].prompt_tokens, events[-1].completion_tokens) == (400, 400)
        assert client.resumed > 12
        assert client.quarantined.convictions == 0


@pytest.mark.parametrize("further", [True, False])
async def test_a_long_prompt_that_gets_further_each_time_is_never_blamed(further: bool) -> None:
    """Its first token is far away, and engines are killed before; but never in the same place."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        client = EngineClient(worker.path)
        task = asyncio.create_task(collect(client, ask(id="long")))
        client.connect()
        deaths = 6
        for pid in range(2, 2 + deaths):
            engine = Resuming()
            notes = NotedSteps(notes_path(worker.path, pid))
            await worker.live(engine, pid=pid, notes=notes)
            await until(lambda engine=engine: getattr(engine, "seen", 0))
            begin = 512 * pid if further else 512
            notes.step(["long"], [(begin, begin + 512)])
            assert worker.server is not None
            worker.server._turns.notes = None
            await worker.die()
            await until(lambda: not client.ready)
            if task.done():
                break
        if further:
            assert client.waiting == 1
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        else:
            assert pid < 1 + deaths
            with pytest.raises(RequestQuarantined):
                await task
        await client.close()
        worker.listening.close()


async def another_life(worker: Worker, pid: int) -> tuple[LastStep, NotedSteps]:
    """A new engine that has been given something: what was noted by then, and where more is noted."""
    engine = Resuming()
    notes = NotedSteps(notes_path(worker.path, pid))
    await worker.live(engine, pid=pid, notes=notes)
    await until(lambda: getattr(engine, "seen", 0))
    last = read_last_step(notes_path(worker.path, pid))
    assert last is not None
    return last, notes


async def test_kills_from_outside_do_not_hit_the_same_suspect_again_and_again() -> None:
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        client = EngineClient(worker.path)
        names = ["a", "b", "c"]
        tasks = [asyncio.create_task(collect(client, ask(name, id=name))) for name in names]
        client.connect()
        alone = []
        for pid in range(2, 6):
            last, notes = await another_life(worker, pid)
            lone = [name for name in names if last.alone(name)]
            notes.step(lone or names)
            alone += lone
            assert worker.server is not None
            worker.server._turns.notes = None
            await worker.die()
            await until(lambda: not client.ready)
        assert alone == ["a", "b", "c"]
        assert client.waiting == 3
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await client.close()
        worker.listening.close()


async def test_queued_requests_are_no_suspects_however_the_engine_dies() -> None:
    async with lives(poison="", pace=0.002, max_sequences=1) as made, client_of(made) as client:
        await client.start()
        long = asyncio.create_task(collect(client, ask("l" * 300, id="long")))
        await until(lambda: made.worker.engine.stats().running == 1)
        queued = [asyncio.create_task(collect(client, ask("q", id=f"q{number}"))) for number in range(5)]
        await until(lambda: made.worker.engine.stats().waiting == 5)
        await until(lambda: made.worker.engine.stats().completion_tokens > 3)
        last = read_last_step(notes_path(made.worker.path, made.worker.server._pid))  # type: ignore[union-attr]
        assert last is not None
        assert last.members == {}
        made.worker.engine.dead.set()
        assert text_of(await long) == "l" * 300
        assert [text_of(await task) for task in queued] == ["q"] * 5


async def test_a_death_that_nobody_noted_makes_a_suspect_in_the_end() -> None:
    """A request that kills before any step, such as while it is received."""
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        client = EngineClient(worker.path)
        task = asyncio.create_task(collect(client, ask(id="early")))
        client.connect()
        alone = []
        for pid in range(2, 9):
            last, _ = await another_life(worker, pid)
            alone.append(last.alone("early"))
            worker.server._turns.notes = None  # type: ignore[union-attr]
            await worker.die()
            await until(lambda: not client.ready)
            if alone[-2:] == [True, True]:
                break
        with pytest.raises(RequestQuarantined):
            await task
        assert alone == [False] * MAX_SUBMISSIONS + [True, True]
        await client.close()
        worker.listening.close()


class Resuming(Silent):
    async def start(self) -> Any:
        import msgspec

        return msgspec.structs.replace(await super().start(), capabilities=frozenset({"resume"}))


async def test_the_deadline_counts_through_deaths() -> None:
    async with lives(poison="", pace=0.01) as made, client_of(made) as client:
        await client.start()
        task = asyncio.create_task(collect(client, ask("x" * 500, timeout=0.4)))
        await until(lambda: made.worker.engine.stats().completion_tokens > 3)
        made.worker.engine.dead.set()
        with pytest.raises(HeadraceError, match=r"than its 0\.[0-3]\d* s: "):
            await task


async def test_leaving_during_the_pause() -> None:
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        client = EngineClient(worker.path)
        client.connect()
        await worker.live(EchoEngine(TOKENIZER, pace=0.005))
        async with aclosing(client.generate(ask("x" * 100))) as batches:
            await anext(batches)
            await worker.die()
            await until(lambda: client.waiting == 1)
        assert client.waiting == 0
        client.give_up(EngineUnavailable("It won't come back."))
        with pytest.raises(EngineUnavailable, match="come back"):
            await collect(client, ask())
        await client.close()
        worker.listening.close()


# The order of turns, by itself


class Stage:
    """An engine of one step at a time, by hand."""

    def __init__(self) -> None:
        self.on: dict[str, tuple[GenerateRequest, Any]] = {}
        self.turns = Turns(self.start)
        self.turns.resumes = True
        self.heard: dict[str, list[Event]] = {}

    def start(self, request: GenerateRequest, deliver: Any) -> Any:
        self.on[request.id] = request, deliver
        return lambda: self.end(request.id)

    def end(self, name: str) -> None:
        self.on.pop(name)[1]([Report(1, 0, 99, 0, 0, 0)])

    def say(self, name: str, index: int, finish: Any = None) -> None:
        events: list[Event] = [Delta(0, index, (index,), "x", finish)]
        deliver = self.on[name][1]
        if finish is not None:
            del self.on[name]
            events.append(Report(1, 0, index + 1, 0, 0, 0))
        deliver(events)

    def run(self, name: str, *, suspect: bool = False) -> Any:
        heard = self.heard[name] = []
        request = GenerateRequest(id=name, prompt=[1], sampling=Sampling(max_tokens=9))
        return self.turns.run(request, heard.extend, suspect=suspect)


async def test_a_suspect_has_the_engine_to_itself_and_the_others_go_on_where_they_were() -> None:
    stage = Stage()
    stage.run("a")
    stage.run("b")
    stage.say("a", 0)
    stage.run("s", suspect=True)
    stage.run("t", suspect=True)
    assert [*stage.on] == ["s"]
    stage.run("late")
    cancel = stage.run("later")
    cancel()
    assert [type(event) for event in stage.heard["later"]] == [Report]
    stage.say("s", 0)
    assert [*stage.on] == ["t"]
    stage.say("t", 0, "stop")
    assert {*stage.on} == {"a", "b", "late", "s"}
    assert stage.on["a"][0].resume == Resume(((0,),))
    assert stage.on["b"][0].resume is None
    assert stage.on["s"][0].resume == Resume(((0,),))
    for name in ("a", "s"):
        stage.say(name, 1, "stop")
        assert indices(stage.heard[name]) == [0, 1]
        assert [type(event) for event in stage.heard[name]] == [Delta, Delta, Report]
    assert not stage.turns.suspects
    assert not stage.turns.held


async def test_a_suspect_that_is_cancelled_makes_room() -> None:
    stage = Stage()
    cancel = stage.run("s", suspect=True)
    cancel_waiting = stage.run("t", suspect=True)
    stage.run("a")
    cancel_waiting()
    cancel()
    assert [*stage.on] == ["a"]


async def test_notes_are_cleared_away(tmp_path: Path) -> None:
    socket = tmp_path / "engine"
    for number in range(30):
        NotedSteps(notes_path(str(socket), 2**22 + 10 + number))
    notes = begin_notes(str(socket))
    notes.step(["a", "b~3"], [(512, 1024), (0, 7)])
    assert len([*tmp_path.iterdir()]) == 17
    (ours,) = [path for path in tmp_path.iterdir() if int(path.name.rpartition("-")[2]) < 2**22]
    last = read_last_step(ours)
    assert last is not None
    assert last.took_part("a")
    assert last.took_part("b")
    assert (last.span("a"), last.span("b")) == ((512, 1024), (0, 7))
    assert not last.took_part("c")
    notes.step(["c"])
    again = read_last_step(ours)
    assert again is not None
    assert again.members.keys() == {digest("c")}
    assert again.span("c") == (0, 0)
    assert read_last_step(tmp_path / "none") is None


def test_a_quarantine_ends() -> None:
    now = 1000.0
    kept = Quarantine(lambda: now)
    bad = ask("bad")
    assert kept.refusal(bad) is None
    assert kept.add(fingerprint(bad), 1010.0)
    assert not kept.add(fingerprint(bad), 1010.0)
    refusal = kept.refusal(ask("bad", id="of another name", timeout=3))
    assert refusal is not None
    assert (refusal.status, refusal.code) == (422, "request_quarantined")
    assert kept.refusal(ask("bad", temperature=0.5)) is None
    assert kept.standing() == [(fingerprint(bad), 1010.0)]
    now = 1011.0
    assert kept.refusal(bad) is None
    assert len(kept) == 0
    assert kept.convictions == 1
