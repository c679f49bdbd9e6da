"""What a supervisor sees of the step loop."""

from __future__ import annotations

import pytest
from driven import Driven

from headrace.engine.pulse import Pulse, Reading


def test_a_step_shows_that_it_runs_and_how_long_it_should_take() -> None:
    driven = Driven()
    pulse = driven.stepper.pulse = Pulse()
    for tokens in range(1, 9):
        driven.stepper._pace.note(tokens, 1.0 + 0.5 * tokens)
    seen: list[Reading] = []
    driven.runner.meanwhile = lambda: seen.append(pulse.read())
    driven.add([1, 2, 3, 4], max_tokens=2)
    driven.step()
    assert seen[0].busy
    assert seen[0].expected == pytest.approx(3.0)
    after = pulse.read()
    assert (after.expected, after.tokens) == (0, 1)
    assert after.steps > seen[0].steps
    driven.drain()
    assert pulse.read().tokens == 2


def test_each_part_of_a_batch_that_failed_is_progress() -> None:
    driven = Driven()
    pulse = driven.stepper.pulse = Pulse()
    driven.runner.poison = 7
    for token in (1, 7, 3, 4):
        driven.add([token, 2])
    driven.step()
    assert pulse.read().steps > 4
