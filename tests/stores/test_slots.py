from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.errors import Overloaded
from headrace.stores.slots import Counts, LeftSlots, SharedSlots, SlotFile
from headrace.types import Report


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "slots"


def test_what_a_worker_counts_the_api_process_reads(path: Path) -> None:
    slots = SlotFile(path)
    slot = slots.take("a")
    shared = SharedSlots(str(path))
    counter = shared.counter(slot)
    assert slots.read(slot) == Counts()
    counter.prompt(2**32 - 1, 7)
    counter.add(1)
    counter.add(3)
    assert slots.read(slot) == Counts(2**32 - 1, 7, 4)
    counter.end(None)
    assert slots.read(slot) == Counts(2**32 - 1, 7, 4, ended=True)
    counter = shared.counter(slots.take("b"))
    counter.add(2)
    counter.end(Report(10, 5, 9, 0, 0, 0))
    assert slots.read(2) == Counts(10, 5, 9, ended=True)
    shared.close()
    slots.close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_another_engine_goes_on_from_what_was_delivered(path: Path) -> None:
    slots = SlotFile(path)
    slot = slots.take("a")
    shared = SharedSlots(str(path))
    first = shared.counter(slot)
    first.prompt(10, 0)
    first.add(5)
    slots.rewind(slot, 3)  # two were never delivered
    second = shared.counter(slot)
    second.prompt(13, 0)  # the prompt, and the three
    second.add(4)
    assert slots.read(slot) == Counts(10, 0, 7)
    second.end(Report(13, 2, 6, 0, 0, 0))
    assert slots.read(slot) == Counts(10, 0, 9, ended=True)
    slots.rewind(slot, 0)
    assert slots.read(slot) == Counts()


def test_slots_are_used_again_and_end_somewhere(path: Path) -> None:
    slots = SlotFile(path, capacity=3)
    taken = [slots.take(str(number)) for number in range(3)]
    with pytest.raises(Overloaded):
        slots.take("one too many")
    SharedSlots(str(path)).counter(taken[1]).add(5)
    slots.free(taken[1])
    assert slots.take("again") == taken[1]
    assert slots.read(taken[1]) == Counts()


def test_only_slots_that_nobody_uses_can_be_claimed(path: Path) -> None:
    slots = SlotFile(path)
    slot = slots.take("a")
    shared = SharedSlots(str(path))
    shared.counter(slot).add(3)
    assert LeftSlots.claim(path) is None
    slots.close()
    assert LeftSlots.claim(path) is None, "a worker still counts"
    shared.close()
    left = LeftSlots.claim(path)
    assert left is not None
    assert LeftSlots.claim(path) is None, "another one recovers"
    with pytest.raises(OSError):
        SharedSlots(str(path))
    assert left.counts("a").completion == 3
    assert left.counts("b") == Counts()
    left.close()


def test_a_file_that_holds_no_counters_is_refused(path: Path) -> None:
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no counters"):
        SharedSlots(str(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError):
        SharedSlots(str(path))
    left = LeftSlots.claim(path)
    assert left is not None
    assert left.counts("a") == Counts()
    left.close()


def test_counts_outlive_a_process_that_is_killed_while_it_counts(path: Path) -> None:
    slots = SlotFile(path)
    slot = slots.take("a")
    program = (
        "import sys; from headrace.stores.slots import SharedSlots\n"
        "counter = SharedSlots(sys.argv[1]).counter(int(sys.argv[2])); counter.prompt(5, 1); number = 0\n"
        "while True:\n"
        "    counter.add(1); number += 1\n"
        "    if number % 1000 == 0: print(number, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path), str(slot)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        seen = 0
        while seen < 5000:
            seen = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        seen = max([seen, *(int(line) for line in process.stdout.read().split()[:-1])])
    counts = slots.read(slot)
    assert counts.completion >= seen
    assert (counts.prompt, counts.cached, counts.ended) == (5, 1, False)
    slots.close()
