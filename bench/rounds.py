"""Interleaving: the sides take turns, round by round, so that what else the machine does falls on all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Measure = Callable[[int], float]
"""One measurement; receives the round's number, from which prompts are made that no round repeats. Round 0 warms up."""


def interleave(
    sides: Mapping[str, Measure], rounds: int, *, warm_up: bool = True, say: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """Measure every side once a round, in an order that is reversed from round to round (A B, B A, …). Values by side.

    The reversal keeps a drift within the run, and what one side leaves behind for the next, from favouring one of them.
    """
    values: dict[str, list[float]] = {name: [] for name in sides}
    if warm_up:
        for measure in sides.values():
            measure(0)
    for number in range(1, rounds + 1):
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            values[name].append(sides[name](number))
        say("  round " + f"{number}/{rounds}: " + ", ".join(f"{name} {values[name][-1]:.4g}" for name in sides))
    return values
