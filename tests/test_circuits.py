from __future__ import annotations

import asyncio

import pytest

from headrace.circuits import CircuitTable
from headrace.control import AskProbe, CircuitCalls, CircuitChanged, ProbeEnded
from headrace.policies.breaker import BreakerRules

pytestmark = pytest.mark.anyio

RULES = BreakerRules(window=10, failure_share=0.5, min_calls=4, open_seconds=0.02, probes=2)


async def test_what_several_processes_say_adds_up_and_all_hear_of_it() -> None:
    heard: list[CircuitChanged] = []
    table = CircuitTable(["m", "other"], RULES, heard.append)
    for process in range(2):
        table.hear(CircuitCalls("m", 0, 1, 1), process)
        table.hear(CircuitCalls("other", 0, 1, 1), process)
    assert heard == []
    table.hear(CircuitCalls("m", 0, 2, 0), 0)
    table.hear(CircuitCalls("m", 0, 1, 1), 1)
    assert [(said.model, said.state) for said in heard] == [("m", "open")]
    assert [(said.model, said.state) for said in table.standing()] == [("m", "open"), ("other", "closed")]


async def test_it_comes_back_by_itself_and_by_probes_of_any_process() -> None:
    heard: list[CircuitChanged] = []
    table = CircuitTable(["m"], RULES, heard.append)
    table.hear(CircuitCalls("m", 0, 4, 4), 1)
    async with asyncio.timeout(5):
        while heard[-1].state != "half_open":
            await asyncio.sleep(0.005)
    one, two, none = (table.hear(AskProbe(number, "m"), holder) for number, holder in ((7, 1), (8, 2), (9, 3)))
    assert one is not None
    assert one.number == 7
    assert one.probe is not None
    assert two is not None
    assert two.probe is not None
    assert none is not None
    assert none.probe is None
    table.lapse(2)
    again = table.hear(AskProbe(10, "m"), 3)
    assert again is not None
    assert again.probe is not None, "a process that died left its place"
    for probe in (one.probe, again.probe):
        table.hear(ProbeEnded("m", probe, True), 1)
    assert [said.state for said in heard] == ["open", "half_open", "closed"]
    assert [said.epoch for said in heard] == [1, 2, 3]
