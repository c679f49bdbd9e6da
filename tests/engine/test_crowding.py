"""When API processes are told of a worker's queue."""

from __future__ import annotations

import asyncio

import pytest

from headrace.config import OverloadSection
from headrace.engine import crowding
from headrace.engine.admission import Admission
from headrace.engine.crowding import Crowding
from headrace.types import GenerateRequest, Sampling
from headrace.waiting import Bounds, Queue

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowding, "CROWDED", 0.05)
    monkeypatch.setattr(crowding, "TELL_INTERVAL", 0.01)


def request(name: str, *, timeout: float | None = None) -> GenerateRequest:
    return GenerateRequest(id=name, prompt=[1, 2, 3], sampling=Sampling(max_tokens=4), tenant=7, timeout=timeout)


async def told_within(seconds: float, heard: list[Queue]) -> int:
    before = len(heard)
    await asyncio.sleep(seconds)
    return len(heard) - before


async def test_news_go_on_for_as_long_as_the_last_one_refused_would_be_refused_again() -> None:
    admission = Admission(OverloadSection(max_queue_requests=1))
    heard: list[Queue] = []

    def tell(queue: Queue, bounds: Bounds) -> None:
        assert bounds.requests == 1
        heard.append(queue)

    news = Crowding(admission, tell)
    news.changed()
    assert await told_within(0.05, heard) == 0, "nobody was refused yet"
    entry = admission.admit(request("first"), lambda: None)
    news.refused(request("second"))
    # Nothing changes, and nobody else comes here: API processes refuse them all.
    assert await told_within(0.3, heard) > 5
    assert heard[-1].requests == 1
    admission.ended(entry)
    await told_within(0.1, heard)
    assert heard[-1].requests == 0
    assert await told_within(0.1, heard) == 0, "there is room again"


async def test_a_deadline_that_can_never_be_met_is_no_crowd() -> None:
    heard: list[Queue] = []
    news = Crowding(Admission(OverloadSection()), lambda queue, bounds: heard.append(queue))
    news.refused(request("hopeless", timeout=1e-9))
    await told_within(0.1, heard)
    assert await told_within(0.1, heard) == 0
