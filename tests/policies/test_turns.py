"""Equal requests in several API processes: whose turn it is to make the answer, and what the others get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from answers_in_memory import KeptAnswers, ToldEngine, greedy, told_journey, until
from hypothesis import given
from hypothesis import strategies as st

from headrace.call import Call
from headrace.errors import DeadlineExceeded, RequestFailed
from headrace.journey import Journey
from headrace.policies import turns as turns_module
from headrace.policies.cache import HEADER
from headrace.policies.turn_table import LATELY, SILENT, TurnMove, TurnTable, TurnWord
from headrace.policies.turns import Turns
from headrace.records import CacheTags
from headrace.types import Delta, Event

pytestmark = pytest.mark.anyio

# The table

A, B, C = 1, 2, 3


class Table:
    """A table and what it has said since one has last listened."""

    def __init__(self) -> None:
        self.now = 0.0
        self._said: list[tuple[int, TurnWord]] = []
        self.table = TurnTable(lambda process, key, number, word: self._said.append((process, word)), clock=lambda: self.now)

    def ask(self, process: int, *, looked: bool = False) -> list[tuple[int, TurnWord]]:
        self.table.hear(process, b"k", process, "ask again" if looked else "ask")
        return self.said()

    def end(self, process: int, how: TurnMove) -> list[tuple[int, TurnWord]]:
        self.table.hear(process, b"k", process, how)
        return self.said()

    def said(self) -> list[tuple[int, TurnWord]]:
        said, self._said = self._said, []
        return said


def test_one_makes_it_and_all_others_find_it() -> None:
    table = Table()
    assert table.ask(A) == [(A, "make")]
    assert table.ask(B) == table.ask(B) == [(B, "wait"), (A, "wanted")]
    assert table.ask(C) == [(C, "wait"), (A, "wanted")]
    assert table.end(A, "kept") == [(B, "look"), (C, "look")]
    assert len(table.table) == 0


def test_one_who_looked_just_before_it_was_kept_is_told_to_look_again_and_only_once() -> None:
    table = Table()
    table.ask(A)
    table.end(A, "kept")
    assert table.ask(B) == [(B, "look")]
    assert table.ask(B, looked=True) == [(B, "make")]
    table.end(B, "left")
    table.now += LATELY
    assert table.ask(C) == [(C, "make")]


def test_one_who_leaves_or_dies_hands_it_to_whoever_has_waited_longest() -> None:
    table = Table()
    for process in (A, B, C):
        table.ask(process)
    table.said()
    assert table.end(A, "left") == [(B, "make")]
    table.table.lapse(B)
    assert table.said() == [(C, "make")]
    assert table.ask(A) == [(A, "wait"), (C, "wanted")]
    table.table.lapse(A)
    assert table.end(C, "left") == []
    assert len(table.table) == 0


def test_of_an_answer_that_is_not_for_others_each_makes_its_own() -> None:
    table = Table()
    for process in (A, B, C):
        table.ask(process)
    table.said()
    assert table.end(A, "apart") == [(B, "make"), (C, "make")]
    assert len(table.table) == 0
    assert table.end(B, "apart") == []


def test_one_who_waits_no_longer_is_told_nothing() -> None:
    table = Table()
    table.ask(A)
    table.ask(B)
    table.said()
    assert table.end(B, "left") == []
    assert table.end(A, "kept") == []


def test_one_who_hangs_loses_its_turn_and_one_who_answers_does_not() -> None:
    table = Table()
    table.ask(A)
    for _ in range(10):
        assert table.ask(B) == [(B, "wait"), (A, "wanted")]
        table.table.hear(A, b"k", A, "go on")
        table.now += 1
    table.ask(B)
    table.now += SILENT + 0.1
    assert table.ask(B) == [(B, "make")]
    assert table.ask(C) == [(C, "wait"), (B, "wanted")]
    # It was only slow; who waits needn't wait for the other.
    assert table.end(A, "kept") == [(C, "look")]
    assert table.end(B, "kept") == []
    assert len(table.table) == 0


_moves = st.tuples(st.sampled_from(["ask", "ask again", "go on", "kept", "left", "apart", "lapse", "time"]), st.integers(1, 4))


@given(st.lists(_moves, max_size=40))
def test_nothing_is_left_when_all_are_gone_and_nobody_who_waits_is_forgotten(moves: list[tuple[str, int]]) -> None:
    now, last = 0.0, {}
    table = TurnTable(lambda process, key, number, word: word == "wanted" or last.update({process: word}), clock=lambda: now)
    for move, process in moves:
        if move in ("ask", "ask again", "go on"):
            table.hear(process, b"k", process, move)  # type: ignore[arg-type]
        elif move == "lapse":
            table.lapse(process)
            last.pop(process, None)
        elif move == "time":
            now += 1.5
        elif last.get(process) == "make" or move == "left":
            table.hear(process, b"k", process, move)  # type: ignore[arg-type]
            last.pop(process, None)
        # Somebody is at work as long as anybody waits.
        assert "wait" not in last.values() or "make" in last.values()
    for process in range(1, 5):
        table.lapse(process)
    assert len(table) == 0


# Processes


class SharedAnswers(KeptAnswers):
    """`ports.Answers` and `ports.Publishes` of one process; what is kept reaches the others by `write`, or when somebody is in a hurry."""

    def __init__(self, below: dict[bytes, bytes]) -> None:
        super().__init__()
        self.below = below
        self.told: Callable[[Sequence[bytes], bool], None] | None = None
        self.shared = self.works = True
        self._hurried = False

    def keep(self, key: bytes, value: bytes, tags: CacheTags) -> None:
        super().keep(key, value, tags)
        if self._hurried:
            asyncio.get_running_loop().call_soon(self.write)

    def hurry(self) -> None:
        self._hurried = True
        if self.kept:
            asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        assert self.told is not None
        if self.works:
            self.below.update({key: value for key, (value, _) in self.kept.items()})
        self.told([*self.kept], self.works)


class Process:
    """An API process of a `Machine`, and its end of the supervisor's socket."""

    def __init__(self, machine: Machine, pid: int, timeout: float) -> None:
        self._machine = machine
        self._pid = pid
        self.answers = SharedAnswers(machine.below)
        self.turns = Turns(self.tell, self.answers)
        self.journey, self.engine, _, self.cache = told_journey(answers=self.answers, turns=self.turns, price=0.5, timeout=timeout)

    def tell(self, moves: list[tuple[bytes, int, TurnMove]]) -> None:
        for key, number, move in moves:
            self._machine.send(self._pid, key, number, move)


class Machine:
    def __init__(self, timeout: float = 60.0) -> None:
        self.below: dict[bytes, bytes] = {}
        self.table = TurnTable(self._say)
        self.deaf = False
        self.asked = 0
        self.processes = [Process(self, pid, timeout) for pid in range(2)]

    def send(self, pid: int, key: bytes, number: int, move: TurnMove) -> None:
        self.asked += move == "ask"
        if not self.deaf:
            asyncio.get_running_loop().call_soon(self.table.hear, pid, key, number, move)

    def _say(self, pid: int, key: bytes, number: int, word: TurnWord) -> None:
        asyncio.get_running_loop().call_soon(self.processes[pid].turns.hear, key, number, word)


async def _read(journey: Journey, call: Call) -> str:
    text = ""
    async with aclosing(journey.run(call)) as batches:
        async for batch in batches:
            text += "".join(event.text for event in batch if isinstance(event, Delta))
    return text


def ask(process: Process, number: int, **fields: Any) -> tuple[Call, asyncio.Task[str]]:
    call = greedy(number, **fields)
    return call, asyncio.create_task(_read(process.journey, call))


def finish(engine: ToldEngine, text: str = "said") -> None:
    engine.say(0, text, finish="stop")
    engine.end(5, 1)


async def at_work(process: Process) -> None:
    await until(lambda: process.engine.requests)


async def waited_for(machine: Machine) -> None:
    await until(lambda: any(turn.waiting for turn in machine.table._turns.values()))


async def over(machine: Machine) -> None:
    """Nothing is left of any of it."""
    await until(lambda: not len(machine.table))
    for process in machine.processes:
        assert not process.turns._turns
        assert not process.turns._keeping
        assert not process.cache.under_way


async def test_equal_requests_in_two_processes_share_one_generation_and_one_pays_for_it() -> None:
    machine = Machine()
    one, two = machine.processes
    first, read = ask(one, 1)
    await at_work(one)
    others = [ask(two, number) for number in (2, 3, 4)]
    await waited_for(machine)
    finish(one.engine)
    assert [await read, *[await task for _, task in others]] == ["said"] * 4
    assert not two.engine.requests
    assert [call.headers[HEADER] for call in (first, *[call for call, _ in others])] == ["miss", "hit", "hit", "hit"]
    assert (first.outcome.billed_prompt_tokens, first.outcome.billed_completion_tokens) == (5, 1)
    for call, _ in others:
        assert (call.outcome.served_from, call.outcome.cache_level) == ("cache", "sqlite")
        assert (call.outcome.own_prompt_tokens, call.outcome.own_completion_tokens) == (0, 0)
        assert call.outcome.billed_prompt_tokens == 3  # half of 5
    assert machine.asked == 2
    await over(machine)


async def test_a_request_right_after_an_equal_one_is_a_hit_though_nothing_was_written_yet() -> None:
    machine = Machine()
    one, two = machine.processes
    _, read = ask(one, 1)
    await at_work(one)
    finish(one.engine)
    await read
    assert not machine.below
    call, second = ask(two, 2)
    assert await second == "said"
    assert call.headers[HEADER] == "hit"
    await over(machine)


@pytest.mark.parametrize("readable", [True, False])
async def test_an_answer_that_is_kept_twice_at_a_time_is_told_of_once(readable: bool) -> None:
    machine = Machine()
    one, _ = machine.processes
    _, normal = ask(one, 1)
    await at_work(one)
    _, fresh = ask(one, 2, cache_control="no-cache")
    await until(lambda: len(one.engine.speaking) == 2)
    for of in (0, 1):
        one.engine.say(0, "said", of=of, finish="stop")
        one.engine.end(5, 1, of=of)
    assert await asyncio.gather(normal, fresh) == ["said", "said"]
    (key,) = one.answers.kept
    assert one.answers.told is not None
    one.answers.told([key, key], readable)
    await over(machine)


async def test_different_requests_wait_for_nothing() -> None:
    machine = Machine()
    tasks = [ask(process, 1, text=f"number {number}")[1] for number, process in enumerate(machine.processes)]
    for process in machine.processes:
        await at_work(process)
        finish(process.engine)
    assert await asyncio.gather(*tasks) == ["said", "said"]


@pytest.mark.parametrize("how", ["hangs up", "fails", "is not for others", "is not written", "was purged"])
async def test_where_nothing_comes_of_it_the_other_makes_its_own(how: str) -> None:
    machine = Machine()
    one, two = machine.processes
    first, read = ask(one, 1)
    await at_work(one)
    second, other = ask(two, 2)
    await waited_for(machine)
    if how == "hangs up":
        read.cancel()
    elif how == "fails":
        one.engine.fail(RequestFailed("broken"))
    else:
        first.storable = how != "is not for others"
        one.answers.purges += how == "was purged"
        one.answers.works = how != "is not written"
        finish(one.engine, "another")
    await asyncio.gather(read, return_exceptions=True)
    await at_work(two)
    finish(two.engine)
    assert await other == "said"
    assert second.headers[HEADER] == "miss"
    assert second.outcome.billed_completion_tokens == 1
    two.answers.write()
    await over(machine)


async def test_when_the_makers_process_dies_the_other_goes_on() -> None:
    machine = Machine()
    one, two = machine.processes
    _, read = ask(one, 1)
    await at_work(one)
    _, other = ask(two, 2)
    await waited_for(machine)
    machine.table.lapse(0)
    await at_work(two)
    finish(two.engine)
    assert await other == "said"
    read.cancel()
    await asyncio.gather(read, return_exceptions=True)


async def test_one_who_waits_may_hang_up_and_those_beside_it_still_get_it() -> None:
    machine = Machine()
    one, two = machine.processes
    _, read = ask(one, 1)
    await at_work(one)
    _, leaves = ask(two, 2)
    await waited_for(machine)
    stays, other = ask(two, 3)
    await until(lambda: next(iter(two.cache._flights.values())).members == 2)
    leaves.cancel()
    await asyncio.gather(leaves, return_exceptions=True)
    finish(one.engine)
    assert (await read, await other, stays.headers[HEADER]) == ("said", "said", "hit")
    await over(machine)


async def test_the_deadline_of_one_who_waits_holds_and_it_waits_no_longer() -> None:
    machine = Machine(timeout=0.05)
    one, two = machine.processes
    _, read = ask(one, 1)
    await at_work(one)
    _, other = ask(two, 2)
    with pytest.raises(DeadlineExceeded, match="another process"):
        await other
    assert not two.engine.requests
    await until(lambda: not any(turn.waiting for turn in machine.table._turns.values()))
    await asyncio.gather(read, return_exceptions=True)
    await over(machine)


@pytest.mark.parametrize("from_the_start", [True, False])
async def test_a_supervisor_that_says_nothing_holds_up_nobody(from_the_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "WORD", 0.02)
    machine = Machine()
    one, two = machine.processes
    machine.deaf = from_the_start
    _, read = ask(one, 1)
    await at_work(one)
    call, other = ask(two, 2)
    if not from_the_start:
        await waited_for(machine)
        machine.deaf = True
    await at_work(two)
    for process in (one, two):
        finish(process.engine)
        process.answers.hurry()
    assert (await read, await other, call.headers[HEADER]) == ("said", "said", "miss")


async def test_a_reader_who_does_not_read_holds_up_nobody_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns_module, "WORD", 0.02)
    monkeypatch.setattr(turns_module, "STANDS", 0.03)
    machine = Machine()
    one, two = machine.processes
    async with aclosing(one.journey.run(greedy(1))) as slow:
        begun: asyncio.Task[list[Event]] = asyncio.ensure_future(anext(slow))
        await at_work(one)
        for index in range(40):
            one.engine.say(index, "x")
        await begun
        _, other = ask(two, 2)
        await at_work(two)
        finish(two.engine)
        assert await other == "said"
    two.answers.write()
    await over(machine)


async def test_what_every_one_looks_for_in_vain_is_made_in_the_end() -> None:
    """An answer that is too large for the second level, as a rule."""
    machine = Machine()
    one, two = machine.processes
    machine.below = one.answers.below = {}
    _, read = ask(one, 1)
    await at_work(one)
    _, other = ask(two, 2)
    await waited_for(machine)
    finish(one.engine)
    await read
    await at_work(two)
    finish(two.engine)
    assert await other == "said"
    two.answers.write()
    await over(machine)


async def test_without_a_level_that_all_read_nobody_is_asked() -> None:
    machine = Machine()
    one, two = machine.processes
    one.answers.shared = two.answers.shared = False
    tasks = [ask(process, 1)[1] for process in (one, two)]
    for process in (one, two):
        await at_work(process)
        finish(process.engine)
    await asyncio.gather(*tasks)
    assert not machine.asked
