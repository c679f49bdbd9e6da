"""In which order requests that are held back go to the engine."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headrace.config import OverloadSection
from headrace.engine.admission import Admission, Entry
from headrace.engine.held import MOST_LOOKS, Held, HeldBack
from headrace.types import PATIENT, GenerateRequest, Sampling
from headrace.waiting import rank_of


class Crowded(Admission):
    """Has room for some tenants only."""

    def __init__(self, room_for: set[int]) -> None:
        super().__init__(OverloadSection())
        self.room_for = room_for

    def has_room(self, entry: Entry) -> bool:
        return entry.request.tenant in self.room_for


class Line:
    def __init__(self, room_for: set[int]) -> None:
        self.admission = Crowded(room_for)
        self.held = HeldBack(self.admission)
        self.went: list[str] = []

    def add(self, tenant: int, name: str) -> Held:
        request = GenerateRequest(id=name, prompt=[1], sampling=Sampling(max_tokens=8), tenant=tenant)
        entry = Entry(request, rank_of("default", PATIENT), 0.0, lambda: None)
        self.admission._enter(entry)

        def start() -> Callable[[], None]:
            self.went.append(name)
            return lambda: None

        held = Held(entry, start, lambda: self.admission.ended(entry))
        self.held.add(held)
        return held


def test_tenants_take_turns() -> None:
    line = Line({1, 2})
    for tenant, name in ((1, "a"), (1, "b"), (1, "c"), (2, "d"), (2, "e")):
        line.add(tenant, name)
    line.held.release()
    assert line.went == ["a", "d", "b", "e", "c"]
    assert not len(line.held)


def test_one_tenant_without_room_isnt_in_anothers_way() -> None:
    line = Line({2})
    for tenant, name in ((1, "a"), (1, "b"), (2, "c"), (3, "d"), (2, "e")):
        line.add(tenant, name)
    line.held.release()
    assert line.went == ["c", "e"]
    line.admission.room_for = {1}
    line.held.release()
    assert line.went == ["c", "e", "a", "b"]
    assert len(line.held) == 1


@pytest.mark.parametrize("others", [MOST_LOOKS - 1, MOST_LOOKS])
def test_only_so_many_are_looked_at(others: int) -> None:
    line = Line({0})
    for tenant in range(1, others + 1):
        line.add(tenant, str(tenant))
    line.add(0, "mine")
    line.held.release()
    assert line.went == (["mine"] if others < MOST_LOOKS else [])


def test_who_has_gone_leaves_at_once_wherever_it_stands() -> None:
    line = Line(set())
    line.add(1, "a")
    behind, alone = line.add(1, "b"), line.add(2, "c")
    line.add(1, "d")
    for gone in (behind, alone, alone):
        gone.cancel()
    assert len(line.held) == 2
    line.admission.room_for = {1, 2}
    line.held.release()
    assert line.went == ["a", "d"]
    assert not line.held._line._ranks
