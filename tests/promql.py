"""As much of PromQL as our rules and dashboards use, over series that a test writes down: promql_parser parses, this evaluates.

https://prometheus.io/docs/prometheus/latest/querying/basics/. What isn't here raises `NotImplementedError`. Where promtool is installed,
test_prometheus_rules.py asks it the same questions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import promql_parser as promql

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
LOOKBACK = 300.0
"""Seconds for which a sample counts as the latest."""


@dataclass(frozen=True)
class Series:
    labels: Labels
    samples: tuple[tuple[float, float], ...]


def parse_series(text: str, values: str, interval: float) -> Series:
    """As promtool's test files have them: `name{label="value"}`, and `1 2 _ 0+10x5`."""
    selector = promql.parse(text)
    labels = frozenset({("__name__", selector.name), *((matcher.name, matcher.value) for matcher in selector.matchers.matchers)})
    found: list[float | None] = []
    for piece in values.split():
        matched = re.fullmatch(r"(-?[\d.]+|_)(?:([+-][\d.]+)?x(\d+))?", piece)
        assert matched is not None, piece
        first, step, times = matched.groups()
        found += [None if first == "_" else float(first) + number * float(step or 0) for number in range(int(times or 0) + 1)]
    return Series(labels, tuple((number * interval, value) for number, value in enumerate(found) if value is not None))


def selectors(expression: Any) -> Iterator[Any]:
    """Every vector selector in an expression."""
    if isinstance(expression, promql.VectorSelector):
        yield expression
    elif isinstance(expression, promql.MatrixSelector):
        yield expression.vector_selector
    elif isinstance(expression, promql.BinaryExpr):
        yield from selectors(expression.lhs)
        yield from selectors(expression.rhs)
    elif isinstance(expression, (promql.ParenExpr, promql.AggregateExpr)):
        yield from selectors(expression.expr)
    elif isinstance(expression, promql.Call):
        for argument in expression.args:
            yield from selectors(argument)
    elif not isinstance(expression, (promql.NumberLiteral, promql.StringLiteral)):
        raise NotImplementedError(type(expression))


def grouped_by(expression: Any) -> set[str]:
    """Every label that an expression's aggregations name."""
    if isinstance(expression, promql.AggregateExpr):
        own = set() if expression.modifier is None else set(expression.modifier.labels)
        return own | grouped_by(expression.expr)
    if isinstance(expression, promql.BinaryExpr):
        return grouped_by(expression.lhs) | grouped_by(expression.rhs)
    if isinstance(expression, promql.Call):
        return set().union(*map(grouped_by, expression.args))
    return grouped_by(expression.expr) if isinstance(expression, promql.ParenExpr) else set()


@dataclass(frozen=True)
class Evaluation:
    """At one moment, in seconds."""

    series: list[Series]
    at: float

    def vector(self, expression: Any) -> Vector:
        found = self.value(expression)
        assert isinstance(found, dict)
        return found

    def value(self, expression: Any) -> Vector | float:
        if isinstance(expression, promql.NumberLiteral):
            return float(expression.val)
        if isinstance(expression, promql.ParenExpr):
            return self.value(expression.expr)
        if isinstance(expression, promql.VectorSelector):
            return {
                series.labels: latest[1]
                for series in self._matching(expression)
                if (latest := max((s for s in series.samples if self.at - LOOKBACK < s[0] <= self.at), default=None)) is not None
            }
        if isinstance(expression, promql.AggregateExpr):
            return self._aggregated(expression)
        if isinstance(expression, promql.Call):
            return self._called(expression)
        if isinstance(expression, promql.BinaryExpr):
            return self._combined(expression)
        raise NotImplementedError(type(expression))

    def _matching(self, selector: Any) -> list[Series]:
        tests: list[tuple[str, Callable[[str], bool]]] = [("__name__", lambda value: value == selector.name)]
        tests += [(matcher.name, _matches(str(matcher.op), matcher.value)) for matcher in selector.matchers.matchers]
        return [series for series in self.series if all(test(dict(series.labels).get(name, "")) for name, test in tests)]

    def _aggregated(self, expression: Any) -> Vector:
        modifier = expression.modifier
        by = set() if modifier is None else set(modifier.labels)
        if modifier is not None and not str(modifier.type).endswith(".By"):
            raise NotImplementedError(modifier)
        groups: dict[Labels, list[float]] = defaultdict(list)
        for labels, value in self.vector(expression.expr).items():
            groups[frozenset(label for label in labels if label[0] in by)].append(value)
        kinds: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}
        return {labels: kinds[str(expression.op)](values) for labels, values in groups.items()}

    def _called(self, expression: Any) -> Vector:
        name = expression.func.name
        if name in ("rate", "increase"):
            matrix = expression.args[0]
            seconds = matrix.range.total_seconds()
            found = {}
            for series in self._matching(matrix.vector_selector):
                # Prometheus 2: the window has both its ends.
                inside = [sample for sample in series.samples if self.at - seconds <= sample[0] <= self.at]
                if len(inside) >= 2:
                    grown = _extrapolated(inside, self.at - seconds, self.at)
                    found[_unnamed(series.labels)] = grown / seconds if name == "rate" else grown
            return found
        if name == "histogram_quantile":
            share = self.value(expression.args[0])
            assert isinstance(share, float)
            buckets: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
            for labels, value in self.vector(expression.args[1]).items():
                end = float(dict(labels)["le"])
                buckets[frozenset(label for label in labels if label[0] != "le")].append((end, value))
            return {_unnamed(labels): _quantile(share, sorted(found)) for labels, found in buckets.items()}
        raise NotImplementedError(name)

    def _combined(self, expression: Any) -> Vector:
        left, right, operator = self.vector(expression.lhs), self.value(expression.rhs), str(expression.op)
        if isinstance(right, float):
            if operator in _COMPARISONS:
                return {labels: value for labels, value in left.items() if _COMPARISONS[operator](value, right)}
            return {_unnamed(labels): _ARITHMETIC[operator](value, right) for labels, value in left.items()}
        modifier = expression.modifier
        on = None if modifier is None or modifier.matching is None else set(modifier.matching.labels)
        if on is not None and not str(modifier.matching.type).endswith(".Include"):
            raise NotImplementedError(modifier)
        many_to_one = modifier is not None and "ManyToOne" in str(modifier.card)

        def key(labels: Labels) -> Labels:
            return frozenset(label for label in labels if (label[0] in on if on is not None else label[0] != "__name__"))

        others = {key(labels): value for labels, value in right.items()}
        pairs = {labels: (value, others[key(labels)]) for labels, value in left.items() if key(labels) in others}
        if operator == "and":
            return {labels: value for labels, (value, _) in pairs.items()}
        assert len(others) == len(right), "several of the right side match one of the left"
        if operator in _COMPARISONS:
            return {labels: one for labels, (one, other) in pairs.items() if _COMPARISONS[operator](one, other)}
        kept = (lambda labels: _unnamed(labels)) if many_to_one or on is None else key
        return {kept(labels): _ARITHMETIC[operator](one, other) for labels, (one, other) in pairs.items()}


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda one, other: one > other,
    "<": lambda one, other: one < other,
    ">=": lambda one, other: one >= other,
    "<=": lambda one, other: one <= other,
    "==": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "+": lambda one, other: one + other,
    "-": lambda one, other: one - other,
    "*": lambda one, other: one * other,
    "/": lambda one, other: one / other if other else float("nan") if not one else float("inf") * one,
}


def _matches(operator: str, wanted: str) -> Callable[[str], bool]:
    kind = operator.rpartition(".")[2]
    if kind == "Equal":
        return lambda value: value == wanted
    if kind == "NotEqual":
        return lambda value: value != wanted
    if kind == "Re":
        return lambda value: re.fullmatch(wanted, value) is not None
    if kind == "NotRe":
        return lambda value: re.fullmatch(wanted, value) is None
    raise NotImplementedError(operator)


def _unnamed(labels: Labels) -> Labels:
    return frozenset(label for label in labels if label[0] != "__name__")


def _extrapolated(samples: list[tuple[float, float]], start: float, end: float) -> float:
    """What a counter grew by in a window: resets added up, and a little more at both ends, as Prometheus' `extrapolatedRate` has it."""
    grown = samples[-1][1] - samples[0][1]
    for (_, before), (_, after) in pairwise(samples):
        if after < before:
            grown += before
    covered = samples[-1][0] - samples[0][0]
    mean = covered / (len(samples) - 1)
    to_start, to_end = samples[0][0] - start, end - samples[-1][0]
    if grown > 0 and samples[0][1] >= 0:
        # A counter doesn't begin below zero.
        to_start = min(to_start, covered * samples[0][1] / grown)
    whole = covered
    for gap in (to_start, to_end):
        whole += gap if gap < mean * 1.1 else mean / 2
    return grown * whole / covered


def _quantile(share: float, buckets: list[tuple[float, float]]) -> float:
    """By linear interpolation within the bucket that it falls into."""
    total = buckets[-1][1]
    if total == 0 or len(buckets) < 2:
        return float("nan")
    rank = share * total
    which = next(number for number, (_, count) in enumerate(buckets) if count >= rank)
    if which == len(buckets) - 1:
        return buckets[-2][0]
    begin, below = (0.0, 0.0) if which == 0 else buckets[which - 1]
    end, count = buckets[which]
    return begin + (end - begin) * (rank - below) / (count - below)
