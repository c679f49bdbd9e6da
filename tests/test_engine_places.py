"""Workers that die, stall, stand by and can't be brought back: real processes over a fake model, without a server around them."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from headrace.address import listen_privately
from headrace.config import Config, ModelSection, ResilienceSection
from headrace.control import Setup, config_to_json
from headrace.engine_places import EnginePlace, check_standby
from headrace.engines import EngineClient
from headrace.errors import ConfigError, EngineUnavailable
from headrace.types import Delta, EngineStatus, GenerateRequest, ModelFiles, Sampling

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

TESTS = Path(__file__).parent


class Place:
    """A place, a client of its workers, and what was said of it."""

    def __init__(self, folder: Path, **rules: object) -> None:
        self.folder = folder
        self.said: list[EngineStatus] = []
        path = folder / "engine"
        self._listening = listen_privately(path)
        files = ModelFiles(name="fake", kind="echo")
        setup = Setup(config_to_json(Config(model=ModelSection(model="echo"))), [files], [str(path)], time.monotonic())
        section = ResilienceSection(**{"stall_timeout": 1.0, **rules})  # type: ignore[arg-type]
        self.place = EnginePlace(
            "engine",
            listening=self._listening,
            folder=folder,
            setup=lambda: setup,
            rules=section,
            received=lambda child, message: None,
            changed=self._changed,
            standby=section.standby,
            module="breakable_worker",
            environment={"PYTHONPATH": f"{TESTS}:{TESTS / 'engine'}", "BREAKABLE": str(folder)},
        )
        self.client = EngineClient(str(path))

    def _changed(self, place: EnginePlace) -> None:
        self.said.append(place.status)
        if place.status.state == "failed":
            self.client.give_up(EngineUnavailable(place.status.reason))
        else:
            self.client.hope()
        if place.status.state == "ready":
            self.client.expect(place.status.pid)

    def break_by(self, name: str, text: str = "") -> None:
        (self.folder / name).write_text(text)

    def mend(self, name: str) -> None:
        (self.folder / name).unlink()

    async def until(self, found: Callable[[], object], what: str, within: float = 30.0) -> None:
        end = time.monotonic() + within
        while not found():
            assert time.monotonic() < end, f"{what} did not come about; {self.place.status}"
            await asyncio.sleep(0.01)

    async def ready(self, deaths: int = 0) -> int:
        """The pid of a worker that serves, after so many deaths."""
        await self.until(lambda: self.place.state == "ready" and self.place.restarts == deaths, f"ready after {deaths} deaths")
        return self.place.pid

    async def standby(self) -> int:
        await self.until(lambda: self.place.others[0].state == "standby", "a standby")
        return self.place.others[0].pid

    async def ask(self, tokens: int = 3) -> int:
        """Tokens of a whole answer; sent at once, whether there is an engine or not."""
        request = GenerateRequest(id=os.urandom(4).hex(), prompt=[1, 2, 3], sampling=Sampling(max_tokens=tokens, ignore_eos=True))
        count = 0
        async with aclosing(self.client.generate(request)) as batches:
            async for batch in batches:
                count += sum(len(event.tokens) for event in batch if isinstance(event, Delta))
        return count

    def states(self) -> list[str]:
        return [line["state"] for line in self.place.listings("fake")]

    async def close(self) -> None:
        await self.client.close()
        self._listening.close()


@asynccontextmanager
async def running(folder: Path, **rules: object) -> AsyncIterator[Place]:
    stand = Place(folder, **rules)
    keeper = asyncio.create_task(stand.place.keep())
    stand.client.connect()
    try:
        await stand.ready()
        yield stand
    finally:
        stand.place.retire()
        stand.place.kill()
        await keeper
        await stand.close()


@pytest.mark.parametrize("busy", [False, True])
async def test_a_stopped_worker_is_replaced_whether_it_has_work_or_not(tmp_path: Path, busy: bool) -> None:
    async with running(tmp_path) as stand:
        first = await stand.ready()
        under_way = asyncio.create_task(stand.ask(1000))
        if busy:
            await stand.until(lambda: stand.place.stats.running == 1, "a running sequence")
        else:
            under_way.cancel()
            await stand.until(lambda: stand.place.stats.running == 0, "an idle engine")
        os.kill(first, signal.SIGSTOP)
        assert await stand.ask() == 3
        assert await stand.ready(1) != first
        assert stand.place.deaths == {"stalled": 1}
        assert stand.place.status.deaths == {"stalled": 1}
        assert [status.state for status in stand.said][-2:] == ["starting", "ready"]
        assert "stopped, or hangs" in stand.said[-2].reason
        under_way.cancel()
        await asyncio.gather(under_way, return_exceptions=True)


@pytest.mark.parametrize(("how", "reason"), [("hang", "no progress"), ("block", "stopped, or hangs")])
async def test_a_worker_that_hangs_is_replaced(tmp_path: Path, how: str, reason: str) -> None:
    async with running(tmp_path) as stand:
        stand.break_by(how)
        assert await stand.ask() == 3
        await stand.ready(1)
        assert stand.place.deaths == {"stalled": 1}
        assert any(reason in status.reason for status in stand.said)


async def test_a_worker_that_cant_even_be_killed_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.children.UNKILLABLE", 0.5)
    async with running(tmp_path) as stand:
        first = await stand.ready()
        process = stand.place.active._process
        assert process is not None
        # As one that hangs in a device's driver: killed, and it doesn't end.
        monkeypatch.setattr(process, "kill", lambda: None)
        under_way = asyncio.create_task(stand.ask(1000))
        await stand.until(lambda: stand.place.stats.running == 1, "a running sequence")
        os.kill(first, signal.SIGSTOP)
        try:
            assert await stand.ask() == 3
            assert await stand.ready(1) != first
            assert stand.place.deaths == {"stalled": 1}
        finally:
            os.kill(first, signal.SIGKILL)
            await process.wait()
            under_way.cancel()
            await asyncio.gather(under_way, return_exceptions=True)


async def test_steps_that_are_expected_to_be_long_are_no_stall(tmp_path: Path) -> None:
    (tmp_path / "slow").write_text("1.4")
    async with running(tmp_path) as stand:
        assert await stand.ask(2) == 2
        assert stand.place.restarts == 0


async def test_a_standby_takes_over_and_another_follows(tmp_path: Path) -> None:
    async with running(tmp_path, standby=True) as stand:
        first, second = await stand.ready(), await stand.standby()
        assert stand.states() == ["ready", "standby"]
        assert await stand.ask() == 3
        assert stand.place.others[0].stats.completion_tokens == 0
        os.kill(first, signal.SIGKILL)
        assert await stand.ask() == 3
        assert await stand.ready(1) == second
        third = await stand.standby()
        assert third not in (first, second)
        assert not stand.place.beginning(stand.place.others[0], None).in_hurry
        os.kill(second, signal.SIGSTOP)
        assert await stand.ask() == 3
        assert await stand.ready(2) == third
        assert stand.place.deaths == {"killed": 1, "stalled": 1}
        # Where engines die one after the other the next standby doesn't give way while it loads.
        assert stand.place.beginning(stand.place.others[0], None).in_hurry


async def test_a_standby_that_stalls_or_dies_costs_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, standby=True) as stand:
        first, second = await stand.ready(), await stand.standby()
        os.kill(second, signal.SIGSTOP)
        await stand.until(lambda: stand.place.others[0].pid not in (0, second), "another standby")
        third = await stand.standby()
        os.kill(third, signal.SIGKILL)
        await stand.until(lambda: stand.place.others[0].pid not in (0, third), "yet another standby")
        assert await stand.ready() == first
        assert stand.place.restarts == 0
        assert await stand.ask() == 3


async def test_progress_resets_the_count_of_failures(tmp_path: Path) -> None:
    async with running(tmp_path) as stand:
        for death in range(1, 4):
            os.kill(stand.place.pid, signal.SIGKILL)
            await stand.ready(death)
        assert stand.place.active._failures == 3
        assert stand.place.active._pause() > 0.25
        assert await stand.ask() == 3
        os.kill(stand.place.pid, signal.SIGKILL)
        await stand.ready(4)
        assert stand.place.active._failures == 1
        assert stand.place.active._pause() == 0


async def test_it_gives_up_after_a_while_and_recovers_by_itself(tmp_path: Path) -> None:
    async with running(tmp_path, give_up_after=1.5) as stand:
        stand.break_by("broken")
        os.kill(stand.place.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(EngineUnavailable, match=r"could not be brought back within 1\.5 s.*file is gone"):
            await stand.ask()
        assert time.monotonic() - began > 1
        assert stand.place.status.state == "failed"
        states = [status.state for status in stand.said if status.restarts]
        assert set(states) == {"starting", "failed"}
        assert "starting" not in states[states.index("failed") :]
        stand.mend("broken")
        await stand.until(lambda: stand.place.state == "ready", "recovery")
        assert await stand.ask() == 3


def test_a_standby_for_a_remote_engine_is_refused() -> None:
    remote = ModelFiles(name="remote", kind="remote", url="https://llm.example.org/v1")
    with pytest.raises(ConfigError, match=r"makes no sense for https://llm\.example\.org/v1"):
        check_standby(ResilienceSection(standby=True), remote)
    check_standby(ResilienceSection(), remote)
    check_standby(ResilienceSection(standby=True), ModelFiles(name="echo", kind="echo"))
