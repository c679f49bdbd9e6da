"""Steps keep their number of rows for a while when a sequence has ended.

OpenVINO prepares hundreds of operations anew for a step with another number of rows than the one before (4 to 6 ms for
135M parameters on 2 cores), which is more than a row costs. A sequence that ends is often followed by another one,
and that step has another number of rows anyway. So its row is kept, as a guess of what another sequence says next, until the rows kept
have cost about what the change does: at worst twice the cost of knowing beforehand (the ski-rental rule).
"""

from __future__ import annotations

PATIENCE = 16
"""Rows, over all steps since the last change, after which the number falls."""


class SteadyRows:
    """Follows steps that only decode; any other kind begins anew."""

    def __init__(self) -> None:
        self._last = 0
        self._spent = 0

    def missing(self, rows: int) -> int:
        """How many rows a step of so many would need to have the last one's number; 0 where it had better have its own."""
        missing = self._last - rows
        return missing if 0 < missing <= PATIENCE - self._spent else 0

    def computed(self, rows: int, *, kept: int) -> None:
        """A step of `rows` rows was computed, `kept` of them to keep the number."""
        self._spent = self._spent + kept if rows == self._last else 0
        self._last = rows

    def forget(self) -> None:
        """The next step has its own number of rows in any case."""
        self._last = self._spent = 0
