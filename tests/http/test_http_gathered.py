"""Counts that were gathered are those that one by one would have been."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from headrace.http.gathered import GATHERED, Gathered

BOUNDS = (0.1, 1.0, 10.0)


def meters(into: CollectorRegistry) -> tuple[Counter, Gauge, Histogram]:
    return (
        Counter("asked", "Requests", ["model"], registry=into),
        Gauge("under_way", "Requests", registry=into),
        Histogram("seconds", "Of requests", ["model"], buckets=BOUNDS, registry=into),
    )


@given(
    counts=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1000))),
    seen=st.lists(st.tuples(st.sampled_from("ab"), st.one_of(st.sampled_from(BOUNDS), st.sampled_from((0.0, 0.25, 3.5, 1e6))))),
    moves=st.lists(st.sampled_from((-1, 1))),
)
def test_they_are_the_same_as_one_by_one(counts: list[tuple[str, int]], seen: list[tuple[str, float]], moves: list[int]) -> None:
    async def gather() -> str:
        registry = CollectorRegistry()
        counter, gauge, histogram = meters(registry)
        gathered = Gathered()
        for model, by in counts:
            gathered.count(counter.labels(model), by)
        for model, value in seen:
            gathered.observe(histogram.labels(model), value)
        for move in moves:
            gathered.count(gauge, move)
        gathered.flush()
        gathered.flush()
        return generate_latest(registry).decode()

    registry = CollectorRegistry()
    counter, gauge, histogram = meters(registry)
    for model, by in counts:
        counter.labels(model).inc(by)
    for model, value in seen:
        histogram.labels(model).observe(value)
    for move in moves:
        gauge.inc(move)
    one_by_one = generate_latest(registry).decode()
    assert without_times(asyncio.run(gather())) == without_times(one_by_one)


def without_times(text: str) -> list[str]:
    return [line for line in text.splitlines() if "_created" not in line]


@pytest.mark.anyio
async def test_they_are_handed_over_in_a_moment() -> None:
    registry = CollectorRegistry()
    counter, _, histogram = meters(registry)
    gathered = Gathered()
    gathered.count(counter.labels("a"))
    gathered.observe(histogram.labels("a"), 0.5)
    assert registry.get_sample_value("asked_total", {"model": "a"}) == 0
    async with asyncio.timeout(10 * GATHERED + 5):
        while not registry.get_sample_value("asked_total", {"model": "a"}):
            await asyncio.sleep(0.005)
    assert registry.get_sample_value("seconds_count", {"model": "a"}) == 1
