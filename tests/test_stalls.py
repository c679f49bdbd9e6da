"""Who is hung and who isn't, on a clock that a test moves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.engine.pulse import Pulse
from headrace.stalls import LOADING, LOOKS, MOST_A_LOOK, StallWatch, WatchedTime, is_stopped, waited_for_processor
from running_server import eventually


class Watched:
    """A worker's pulse, and its watcher, who looks every `LOOKS` seconds."""

    def __init__(self, stall_timeout: float = 5.0) -> None:
        self.pulse = Pulse()
        self.clock = 100.0
        self.time = WatchedTime(lambda: self.clock)
        self.delays = {1: 0.0}
        self.stopped = False
        self.watch = StallWatch(self.pulse, stall_timeout, now=0.0, delays=lambda: dict(self.delays), stopped=lambda: self.stopped)

    def look(self, seconds: float = LOOKS, *, ready: bool = True) -> str:
        self.clock += seconds
        return self.watch.look(self.time.look(), ready=ready)

    def until_blamed(self, *, beating: bool = False, most: float = 100.0, starved: float = 0.0, ready: bool = True) -> float:
        """Seconds until it is blamed."""
        began = self.clock
        while self.clock - began < most:
            if beating:
                self.pulse.beat()
            self.delays[1] += LOOKS * starved
            if self.look(ready=ready):
                return self.clock - began
        return float("inf")


def test_an_idle_worker_whose_loop_turns_is_well() -> None:
    assert Watched().until_blamed(beating=True) == float("inf")


def test_a_worker_in_which_nothing_moves_is_blamed_after_the_timeout() -> None:
    watched = Watched()
    watched.look()
    assert watched.until_blamed() == pytest.approx(5, abs=2 * LOOKS)


def test_a_step_that_never_ends_is_blamed_though_the_event_loop_turns() -> None:
    watched = Watched()
    watched.pulse.begin(0.02)
    watched.look()
    assert watched.until_blamed(beating=True) == pytest.approx(5, abs=2 * LOOKS)


def test_work_that_the_step_loop_never_takes_is_blamed() -> None:
    watched = Watched()
    watched.pulse.end(3)
    watched.pulse.rest()
    assert watched.until_blamed(beating=True, most=20) == float("inf")
    watched.pulse.want()
    assert watched.until_blamed(beating=True) == pytest.approx(5, abs=2 * LOOKS)


def test_a_long_step_may_take_three_times_its_length() -> None:
    watched = Watched()
    watched.pulse.begin(4.0)
    watched.look()
    assert watched.until_blamed(beating=True) == pytest.approx(12, abs=2 * LOOKS)
    # Nor is the event loop blamed meanwhile: libraries may hold the interpreter for the length of a step.
    watched = Watched()
    watched.pulse.begin(4.0)
    watched.look()
    assert watched.until_blamed() == pytest.approx(12, abs=2 * LOOKS)


def test_progress_is_forgiven_everything() -> None:
    watched = Watched()
    for _ in range(20):
        watched.pulse.begin(0.02)
        assert watched.until_blamed(beating=True, most=4.5) == float("inf")


def test_a_watcher_that_was_away_blames_nobody() -> None:
    watched = Watched()
    watched.pulse.begin(0.02)
    watched.look()
    for _ in range(3):
        assert not watched.look(3600)
    assert watched.time.now < 3 * MOST_A_LOOK + 1


def test_a_worker_without_a_processor_is_spared_for_a_while() -> None:
    watched = Watched()
    watched.look()
    assert watched.until_blamed(starved=0.5) == pytest.approx(9, abs=1)
    watched = Watched()
    watched.look()
    assert watched.until_blamed(starved=1.0) == pytest.approx(20, abs=1)


def test_loading_has_a_limit_of_its_own() -> None:
    watched = Watched()
    assert watched.until_blamed(ready=False, most=2 * LOADING) == pytest.approx(LOADING, abs=1)


def test_who_is_stopped_while_it_loads_is_blamed() -> None:
    watched = Watched()
    assert watched.until_blamed(ready=False, most=20) == float("inf")
    watched.stopped = True
    assert watched.until_blamed(ready=False) == pytest.approx(5, abs=2 * LOOKS)


def test_two_processes_share_a_pulse(tmp_path: Path) -> None:
    ours = Pulse.create(tmp_path / "pulse")
    theirs = Pulse.join(tmp_path / "pulse")
    theirs.beat()
    theirs.want()
    theirs.begin(0.25)
    assert ours.read() == (1, 1, True, 0, 0.25)
    theirs.end(7)
    theirs.rest()
    assert ours.read() == (1, 2, False, 7, 0.0)
    assert (tmp_path / "pulse").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_the_system_says_of_a_process() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert set(waited_for_processor(sleeper.pid)) == {sleeper.pid}
        assert not is_stopped(sleeper.pid)
        os.kill(sleeper.pid, signal.SIGSTOP)
        eventually(lambda: is_stopped(sleeper.pid))
    finally:
        sleeper.kill()
        sleeper.wait()
    assert waited_for_processor(sleeper.pid) == {}
    assert not is_stopped(sleeper.pid)
