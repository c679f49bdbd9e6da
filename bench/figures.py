"""What a benchmark finds: figures, each with the two sides it comes from and the bound it is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal


@dataclass(frozen=True, slots=True)
class Side:
    """One side's measurements, a value a round."""

    name: str
    values: tuple[float, ...]
    unit: str

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def text(self) -> str:
        low, high = min(self.values), max(self.values)
        spread = f" ({_number(low)} to {_number(high)})" if len(self.values) > 1 else ""
        return f"{self.name}: {_number(self.median)} {self.unit}{spread}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number and what it is held to."""

    what: str
    value: float
    bound: float | None = None
    """None: shown for its own sake."""
    sense: Literal["at least", "at most"] = "at least"
    unit: str = "×"
    sides: tuple[Side, ...] = ()

    @property
    def met(self) -> bool | None:
        """Whether the figure keeps its bound; None where it has none."""
        if self.bound is None:
            return None
        return self.value >= self.bound if self.sense == "at least" else self.value <= self.bound

    @property
    def verdict(self) -> str:
        return "" if self.met is None else "yes" if self.met else "NO"

    @property
    def bound_text(self) -> str:
        return "" if self.bound is None else f"{'≥' if self.sense == 'at least' else '≤'} {_number(self.bound)} {self.unit}"

    @property
    def value_text(self) -> str:
        return f"{_number(self.value)} {self.unit}"


@dataclass(frozen=True, slots=True)
class Findings:
    """A benchmark's figures, with what a reader should know about how they were got."""

    title: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def met(self) -> bool:
        return all(figure.met is not False for figure in self.figures)


def ratio(what: str, ours: Side, theirs: Side, *, bound: float | None = None, sense: Literal["at least", "at most"] = "at least") -> Figure:
    """The median of one side over the median of the other."""
    return Figure(what, ours.median / theirs.median, bound, sense, "×", (ours, theirs))


def as_markdown(findings: Findings) -> str:
    """The table that is printed and that RESULTS.md keeps."""
    lines = ["| figure | value | bound | met | sides: median (range) |", "|---|---|---|---|---|"]
    for figure in findings.figures:
        sides = "; ".join(side.text for side in figure.sides)
        lines.append(f"| {figure.what} | {figure.value_text} | {figure.bound_text} | {figure.verdict} | {sides} |")
    lines += [f"\n{note}" for note in findings.notes]
    return "\n".join(lines)


def quantile(values: Sequence[float], q: float) -> float:
    """Linear interpolation between closest ranks; `q` from 0 to 1."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    place = (len(ordered) - 1) * q
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"
