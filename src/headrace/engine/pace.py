"""How long a step will take, and so how many prompt tokens fit in it.

A step costs a fixed part (reading the weights) and a part for each token (products). Both are estimated from the
steps as they happen, by least squares with forgetting, so that the scheduler keeps steps short on any machine with
any model. Short steps are what lets a newcomer's first token come soon: it waits for the step under way.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Haste(NamedTuple):
    """How long prefill may make a step last."""

    seconds: float
    fixed_shares: int
    """A step is worth at least so many times what it costs before its first token: a large model's steps can't be short."""
    spends: bool
    """Whether it may last longer by what the steps before it have saved."""


RELAXED = Haste(0.18, 5, True)
"""While one tenant has the engine to itself: long chunks waste least, and those who read along get five tokens a second at least."""
BRISK = Haste(0.05, 2, False)
"""The same while several tenants share the engine, or did so recently."""
EVEN = Haste(0.12, 5, False)
"""While the requests of one tenant take more than half of the slots. Taken in long steps, prompts would fill all slots in one wave: then
the engine has nothing but decodes to do until they come free, all at once again, where decodes cost next to nothing beside prompts."""
MEMORY = 60.0
"""Seconds for which the engine remembers that several tenants shared it."""
LEAST_PREFILL = 16
"""Prompt tokens that a step always has room for, however long its decodes take: prefill is never starved. It is little,
so that the batch of a tenant with many requests stops growing where its decodes alone fill a step."""
EXPRESS_PREFILL = 128
"""Prompt tokens that a step always has room for when no decodes wait for its end."""
STEADY, MOST_SAVED = 0.12, 0.25
"""Seconds below which a step saves what it is short of, and the most that is saved. Who reads along gets a steady pace on average,
and a wave of prompts after many short steps is done in few long ones."""
_KEEP = 0.98


class Pace:
    """Seconds of a step as `fixed + per_token x tokens`."""

    def __init__(self) -> None:
        self._all = _Line()
        self._prompts = _Line()
        """Of steps with prompts in them. They cost more than their tokens do: a runner prepares its operations for every new shape. Taken
        together with steady decodes that looks like a price of tokens, and the smaller the chunks were cut for it, the higher it looked."""
        self.per_token = 0.0
        self.fixed = 0.0
        self.saved = 0.0
        """Seconds that the last steps took less than `STEADY`."""

    def note(self, tokens: int, seconds: float, *, prompts: bool = False) -> None:
        """Learn from a step that has been; `prompts` if any were in it."""
        self.saved = min(MOST_SAVED, max(0.0, self.saved + STEADY - seconds))
        if self._all.weight > 5:
            # A machine that stalled for a moment says nothing about the next step.
            seconds = min(seconds, 3 * self.seconds(tokens) + 0.005)
        self._all.note(tokens, seconds)
        self.per_token, self.fixed = self._all.slope, self._all.intercept
        if prompts:
            self._prompts.note(tokens, seconds)

    def seconds(self, tokens: int) -> float:
        """What a step of so many tokens is expected to take."""
        return self.fixed + self.per_token * tokens

    def room(self, haste: Haste, beside: int) -> int:
        """Prompt tokens that fit in a step of such haste beside `beside` decodes; a large number where unknown."""
        if self.per_token <= 0:
            return 1 << 30
        each, fixed = self.per_token, self.fixed
        if self._prompts.slope > 0:
            each, fixed = self._prompts.slope, self._prompts.intercept
        # A step that is worth its while spends half of its time on tokens at least.
        seconds = max(haste.seconds + haste.spends * self.saved, haste.fixed_shares * self.fixed, 2 * fixed)
        return max(0, math.floor((seconds - fixed) / each) - beside)


class _Line:
    """A straight line through points that fade: least squares with forgetting."""

    def __init__(self) -> None:
        self.weight = self._x = self._y = self._xx = self._xy = 0.0
        self.slope = 0.0
        self.intercept = 0.0

    def note(self, x: float, y: float) -> None:
        self.weight = self.weight * _KEEP + 1
        self._x = self._x * _KEEP + x
        self._y = self._y * _KEEP + y
        self._xx = self._xx * _KEEP + x * x
        self._xy = self._xy * _KEEP + x * y
        mean_x, mean_y = self._x / self.weight, self._y / self.weight
        variance = self._xx / self.weight - mean_x * mean_x
        if variance > max(4.0, 0.01 * mean_x * mean_x):
            # Steps of one size only, such as decodes, say nothing about the price of a token; then it stays as it was.
            self.slope = max(0.0, (self._xy / self.weight - mean_x * mean_y) / variance)
        self.intercept = max(0.0, mean_y - self.slope * mean_x)
