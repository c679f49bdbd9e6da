"""Steps keep their number of rows for a while when a sequence has ended."""

from driven import Driven
from fake_runner import greedy

from headrace.engine.steady_rows import PATIENCE, SteadyRows


def test_rows_are_kept_until_they_have_cost_what_the_change_does() -> None:
    rows = SteadyRows()
    rows.computed(4, kept=0)
    steps = 0
    while rows.missing(3) == 1:
        rows.computed(4, kept=1)
        steps += 1
    assert steps == PATIENCE
    rows.computed(3, kept=0)
    assert rows.missing(3) == 0
    assert rows.missing(2) == 1


def test_many_rows_are_not_kept_and_none_are_added_for_a_growing_batch() -> None:
    rows = SteadyRows()
    rows.computed(32, kept=0)
    assert rows.missing(32 - PATIENCE - 1) == 0
    assert rows.missing(33) == 0
    rows.forget()
    assert rows.missing(31) == 0


def test_a_sequence_that_ends_leaves_its_row_for_a_while_and_nobody_else_notices() -> None:
    limits = [20, 60, 60, 60, 60, 60]
    driven = Driven(block_size=8, num_blocks=100, memory=2, step_tokens=64)
    prompts = [[number + 1, 2, 3] for number in range(len(limits))]
    answers = [driven.add(prompt, max_tokens=limit) for prompt, limit in zip(prompts, limits, strict=True)]
    driven.drain()
    for answer, prompt, limit in zip(answers, prompts, limits, strict=True):
        assert answer.tokens() == greedy(prompt, limit, memory=2)
        assert answer.report is not None
        assert answer.report.completion_tokens == limit
    rows = [len(sizes) for sizes in driven.runner.sizes[1:]]
    # Fewer steps than tokens where what was computed in the row came true.
    kept = rows[19 : 19 + PATIENCE - 1]
    assert set(kept) == {6}
    assert 5 in rows
    assert driven.stepper.stats().blocks_used == 0


def test_rows_are_not_kept_where_tokens_cannot_be_tried_out() -> None:
    driven = Driven(block_size=8, num_blocks=100, step_tokens=64)
    for number, limit in enumerate([10, 20, 20, 20, 20]):
        driven.add([number + 1, 2, 3], max_tokens=limit)
    driven.drain()
    rows = [len(sizes) for sizes in driven.runner.sizes[1:]]
    assert rows == [5] * 9 + [4] * 10
