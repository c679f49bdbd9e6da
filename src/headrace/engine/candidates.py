"""Draws from a distribution of which only the likeliest tokens and the total mass are known, and knows when it can't.

The candidates are a row's likeliest tokens; of the others (the tail) we know that none is likelier than the last
candidate, and at temperature 1 their mass, from the log-sum-exp. At another temperature T the tail's mass isn't known,
but it has bounds: with tail weights y at T = 1, of which there are n with the sum m and the largest at most e,

    T < 1:  n (m/n)^(1/T) ≤ Σ y^(1/T) ≤ m e^(1/T − 1)         T > 1:  the same, the other way round

(the power mean inequality, and y^(1/T) = y y^(1/T − 1)). If the token is the same for the least and the largest tail,
it is the token for any tail between, since both the total and the nucleus of top_p grow with it. If it isn't, or lies
in the tail itself, the place is `UNDECIDED` and `invert` finds it from all logits.

Both go through the tokens in the same order, the tail and then the candidates, and add in float64, so that they agree
on every token that the candidates decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

UNDECIDED = -1

SLACK = 1e-4
"""How wrong the log-sum-exp and the candidates' mass, added in float32 on a device, may be, relative to the total."""

_MANY = 2048
"""Tokens of the tail that are sorted first, where a nucleus reaches into it; the whole vocabulary takes ten times as long."""


class Filters(NamedTuple):
    """What a draw is filtered with, in the order of use."""

    temperature: float
    min_p: float
    top_k: int
    """At least 1; the vocabulary's size is off."""
    top_p: float


def draw(
    logits: NDArray[np.float32], logsumexp: NDArray[np.float32], filters: Sequence[Filters], uniforms: Sequence[float], vocab_size: int
) -> list[int]:
    """For each row its place among the candidates, or `UNDECIDED`. `logits` [R, k], likeliest first; the others [R]."""
    count = logits.shape[1]
    settings = np.array(filters, np.float64)
    temperature, min_p, top_k, top_p = (settings[:, column, None] for column in range(4))
    uniform = np.array(uniforms)[:, None]
    # Overflow to infinity and products of zero are the right limits here.
    with np.errstate(all="ignore"):
        gaps = logits.astype(np.float64)
        largest = gaps[:, :1].copy()
        last = gaps[:, -1:] - largest
        total = np.exp(logsumexp[:, None] - largest)
        gaps -= largest
        least, most = _tail(total, np.exp(gaps).sum(axis=1, keepdims=True), last, vocab_size - count, temperature)
        weights = np.exp(gaps / temperature)
    weights *= weights >= min_p
    weights *= np.arange(count) < top_k
    # What of the tail has survived is unknown, unless nothing can have.
    gone = (top_k <= count) | (weights[:, -1:] == 0)
    most[gone] = 0
    least[gone | (min_p > 0) | (top_k < vocab_size)] = 0
    cumulative = weights.cumsum(axis=1)
    known = cumulative[:, -1:]
    low, high = known + least, known + most
    if (top_p < 1).any():
        low, high = _nucleus(cumulative, weights[:, -1:], low, high, top_p)
    one, other = _target(uniform, low, known), _target(uniform, high, known)
    # The target rises with the mass up to where all candidates are in, and falls with what the tail adds.
    lowest, highest = np.minimum(one, other), np.where((low < known) & (known < high), uniform * known, np.maximum(one, other))
    first = (cumulative <= lowest).sum(axis=1)
    second = (cumulative <= highest).sum(axis=1)
    places = np.where((first == second) & (lowest[:, 0] >= 0), first, UNDECIDED)
    return places.tolist()  # type: ignore[no-any-return]


def _target(uniform: Any, mass: Any, known: Any) -> Any:
    """Where among the candidates' cumulative weights a draw lies; negative in the tail, which comes first.

    With the tail first, a change of its weight by δ moves the border after a candidate by δ times the probability of
    those behind it, which is little for most borders. With the tail last it would be that of those before it.
    """
    inside = np.minimum(mass, known)
    return uniform * inside - (1 - uniform) * (mass - inside)


def _tail(
    total: NDArray[np.float64], known: NDArray[np.float64], last: NDArray[np.float64], number: int, temperature: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of the tail's weight at a temperature, [R, 1] each, in units of the likeliest token's weight."""
    if number <= 0:
        return np.zeros_like(total), np.zeros_like(total)
    power = 1 / temperature
    small = np.maximum(total * (1 - SLACK) - known, 0)
    large = np.maximum(total * (1 + SLACK) - known, total * SLACK)
    large = np.minimum(large, number * np.exp(last))
    small = np.minimum(small, large)
    # Beyond e^±700 lies nothing that matters; it keeps 0 × ∞ out.
    steepness = np.exp(np.clip(last * (power - 1), -700, 700))
    cold = temperature < 1
    least = np.where(cold, number * (small / number) ** power, small * steepness)
    most = np.where(cold, large * steepness, number * (large / number) ** power)
    most = np.minimum(most, number * np.exp(last * power))
    return np.minimum(least, most), most


def _nucleus(
    cumulative: NDArray[np.float64],
    last: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    top_p: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of the weight of the fewest likeliest tokens that have `top_p` of the total, where the total has bounds."""
    known = cumulative[:, -1:]
    bounds = []
    for total, beyond in ((low, top_p * low), (high, np.minimum(high, top_p * high + last))):
        wanted = top_p * total
        # The token that reaches the wanted mass is the last of the nucleus.
        place = np.minimum((cumulative < wanted).sum(axis=1, keepdims=True), cumulative.shape[1] - 1)
        inside = np.take_along_axis(cumulative, place, axis=1)
        reached = np.where((wanted <= known) | (high == known), inside, beyond)
        bounds.append(np.where(top_p < 1, reached, total))
    return bounds[0], bounds[1]


def invert(logits: NDArray[np.floating], head: NDArray[np.int64], filters: Filters, uniform: float) -> int:
    """The token, from all logits of a row. `head` are the likeliest tokens, likeliest first, in the order of `draw`."""
    temperature, min_p, top_k, top_p = filters
    weights = logits.astype(np.float64)
    weights -= weights[head[0]]
    with np.errstate(over="ignore"):
        weights /= temperature
    np.exp(weights, out=weights)
    weights[weights < min_p] = 0
    candidates = weights[head]
    candidates[top_k:] = 0
    cumulative = candidates.cumsum()
    known = cumulative[-1]
    weights[head] = 0
    order: NDArray[np.int64] | None = None
    if top_k <= len(head):
        weights[:] = 0
    elif top_k < len(weights):
        order = np.argsort(-weights)
        weights[order[top_k - len(head) :]] = 0
    mass = known + weights.sum()
    if top_p < 1:
        wanted = top_p * mass
        if wanted <= known:
            mass = cumulative[np.searchsorted(cumulative, wanted)]
        else:
            order, upwards = _upwards(weights, known, wanted) if order is None else (order, known + weights[order].cumsum())
            mass = upwards[min(int(np.searchsorted(upwards, wanted)), len(upwards) - 1)]
    target = _target(uniform, mass, known)
    if target >= 0:
        return int(head[np.searchsorted(cumulative, target, side="right")])
    beyond = weights.cumsum() if order is None else weights[order].cumsum()
    place = int(np.searchsorted(beyond, min(uniform * mass, np.nextafter(min(mass - known, beyond[-1]), 0)), side="right"))
    return place if order is None else int(order[place])


def _upwards(weights: NDArray[np.float64], known: float, wanted: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The likeliest tokens of the tail and their cumulative weights on top of `known`, as many as `wanted` takes."""
    order = likeliest(weights, _MANY)
    upwards = known + weights[order].cumsum()
    if upwards[-1] < wanted:
        order = np.argsort(-weights)
        upwards = known + weights[order].cumsum()
    return order, upwards


def likeliest(logits: NDArray[np.floating], count: int) -> NDArray[np.int64]:
    """The `count` likeliest tokens, likeliest first; of equals the lower id first."""
    # In float32, where this is four times as fast; rounding may make equals, which are sorted out among the few.
    negative = -logits.astype(np.float32)
    if count < len(negative):
        found = np.flatnonzero(negative <= np.partition(negative, count - 1)[count - 1])
    else:
        found = np.arange(len(negative))
    return found[np.lexsort((found, -logits[found]))][:count]


def lower_first(ids: NDArray[np.int64], logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """`ids` [R, k], whose `logits` fall along each row, with equals in the order of `likeliest`: the lower id first.

    Equals are many in bfloat16, and devices put them in any order, in another one for another k: a row's token would depend on what else
    is in the batch.
    """
    return np.take_along_axis(ids, np.lexsort((ids, -logits), axis=-1), -1)
