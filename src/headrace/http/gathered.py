"""Counts gathered here before they go to prometheus_client, where each is written to a file: many at once cost what one costs."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import Any

GATHERED = 0.1
"""Seconds that a count may be gathered while requests are being answered."""


class Gathered:
    """Of counters, gauges and histograms whose labels are resolved. Nothing is left here once `flush` was called."""

    __slots__ = ("_counted", "_observed", "_timer")

    def __init__(self) -> None:
        self._counted: dict[Any, float] = {}
        self._observed: dict[Any, _Observed] = {}
        self._timer: asyncio.TimerHandle | None = None

    def count(self, meter: Any, by: float = 1.0) -> None:
        """To a counter or a gauge."""
        self._counted[meter] = self._counted.get(meter, 0.0) + by
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHERED, self.flush)

    def observe(self, histogram: Any, value: float) -> None:
        observed = self._observed.get(histogram)
        if observed is None:
            observed = self._observed[histogram] = _Observed(histogram)
        observed.total += value
        observed.buckets[bisect_left(observed.bounds, value)] += 1
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(GATHERED, self.flush)

    def flush(self) -> None:
        """Hand over what was gathered."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        counted, self._counted = self._counted, {}
        observed, self._observed = self._observed, {}
        for meter, by in counted.items():
            if by:
                meter.inc(by)
        for seen in observed.values():
            seen.hand_over()


class _Observed:
    """What a histogram has seen. It has no way to be told of many at once but by its parts, as its own `observe` uses them."""

    __slots__ = ("_histogram", "bounds", "buckets", "total")

    def __init__(self, histogram: Any) -> None:
        self._histogram = histogram
        self.bounds: list[float] = histogram._upper_bounds
        self.buckets = [0] * len(self.bounds)
        self.total = 0.0

    def hand_over(self) -> None:
        self._histogram._sum.inc(self.total)
        for number, seen in enumerate(self.buckets):
            if seen:
                self._histogram._buckets[number].inc(seen)
