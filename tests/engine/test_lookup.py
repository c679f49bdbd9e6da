"""Guessing the next tokens, and what becomes of guesses in a step."""

from __future__ import annotations

import itertools

import pytest
from driven import Answer, Driven
from fake_runner import LETTERS, VOCABULARY, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.lookup import FIRST_SHARE, LEAST, REACH, WIDTHS, Lookup
from headrace.types import TokenLogprob


def test_what_followed_the_same_words_is_guessed() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert lookup.guess(3) == [4, 5, 6]
    lookup.take(4)
    assert lookup.guess(4) == [5, 6, 7, 1]
    lookup.take(9)
    assert lookup.guess(4) == []


def test_the_latest_place_counts_and_repetition_goes_on() -> None:
    assert Lookup([1, 2, 3, 1, 2, 4, 1, 2]).guess(2) == [4, 1]
    lookup = Lookup([8, 9, 8, 9, 8, 9, 8, 9, 8, 9])
    assert lookup.guess(6) == [8, 9, 8, 9, 8, 9]


@pytest.mark.parametrize("tokens", [[], [1], [1, 2], [1, 2, 3]])
def test_nothing_said_twice_gives_no_guess(tokens: list[int]) -> None:
    assert Lookup(tokens).guess(3) == []


def test_the_share_goes_with_what_came_true_and_can_come_back() -> None:
    lookup = Lookup([*[1, 2, 3] * 5, 1, 2])
    for fresh in range(30):
        lookup.guess(3)
        lookup.take(100 + fresh)
    assert lookup.share < LEAST < FIRST_SHARE
    for token in [1, 2, 3] * 30:
        assert len(lookup.guess(0)) == 0
        lookup.take(token)
    assert lookup.share > 0.8


def test_a_long_text_is_forgotten_at_its_beginning() -> None:
    lookup = Lookup(range(10 * REACH))
    for token in range(5 * REACH):
        lookup.take(token)
    assert len(lookup._tokens) <= 4 * REACH
    assert len(lookup._places) <= 4 * REACH


def served(prompt_lookup: bool, memory: int, requests: list[dict[str, object]], block_size: int, prompts: list[list[int]]) -> list[Answer]:
    driven = Driven(num_blocks=120, block_size=block_size, memory=memory, prompt_lookup=prompt_lookup, step_tokens=64)
    answers = []
    for prompt, request in zip(prompts, requests, strict=True):
        answers.append(driven.add(prompt, **request))  # type: ignore[arg-type]
        driven.step()
    driven.drain()
    return answers


request = st.fixed_dictionaries(
    {
        "max_tokens": st.integers(1, 60),
        "temperature": st.sampled_from([0.0, 0.0, 0.2, 0.5, 1.0]),
        "seed": st.integers(0, 9),
        "n": st.sampled_from([1, 1, 3]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "logprobs": st.sampled_from([None, 2]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.5]),
        "min_tokens": st.sampled_from([0, 0, 7]),
        "ignore_eos": st.booleans(),
        "stop": st.lists(st.text(LETTERS, min_size=1, max_size=2), max_size=2).map(tuple),
    }
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(request, st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=30)), min_size=1, max_size=5),
    st.integers(1, 2),
    st.sampled_from([4, 16]),
)
def test_guesses_change_nothing_in_an_answer(work: list[tuple[dict[str, object], list[int]]], memory: int, block_size: int) -> None:
    requests, prompts = [item[0] for item in work], [item[1] for item in work]
    plain = served(False, memory, requests, block_size, prompts)
    guessed = served(True, memory, requests, block_size, prompts)
    for one, other, wanted in zip(plain, guessed, requests, strict=True):
        for choice in range(int(wanted["n"])):  # type: ignore[call-overload]
            assert one.tokens(choice) == other.tokens(choice)
            assert one.text(choice) == other.text(choice)
            assert one.last(choice).finish == other.last(choice).finish
            assert one.last(choice).stop_reason == other.last(choice).stop_reason
            assert logprobs(one, choice) == logprobs(other, choice)
        assert one.report is not None
        assert other.report is not None
        assert one.report.completion_tokens == other.report.completion_tokens


def logprobs(answer: Answer, choice: int) -> list[TokenLogprob]:
    return [logprob for delta in answer.deltas(choice) for logprob in delta.logprobs]


def test_guesses_that_come_true_save_steps() -> None:
    driven = Driven(block_size=16, memory=1, step_tokens=64)
    answer = driven.add([5, 6, 7], max_tokens=100)
    driven.drain()
    assert answer.tokens() == greedy([5, 6, 7], 100, memory=1)
    stats = driven.stepper.stats()
    assert stats.completion_tokens == 100
    assert stats.right_tokens == 100 - stats.steps
    assert stats.steps < 50
    assert stats.right_tokens <= stats.guessed_tokens


def test_no_guess_is_made_where_tokens_cannot_be_tried_out_or_nobody_wants_it() -> None:
    for one in (Driven(), Driven(memory=1, prompt_lookup=False)):
        one.add([5, 6, 7], max_tokens=60)
        one.drain()
        assert one.stepper.stats().guessed_tokens == 0
        assert one.stepper.stats().steps == 60


def test_text_that_says_nothing_twice_costs_no_rows_for_long() -> None:
    driven = Driven(block_size=16, num_blocks=100, step_tokens=64)
    driven.runner.rewinds = True
    driven.stepper._guessing = True
    answer = driven.add([5, 6, 7], max_tokens=150)
    driven.drain()
    assert answer.tokens() == greedy([5, 6, 7], 150)
    assert driven.runner.sizes[-1] == [1]
    assert driven.stepper.stats().guessed_tokens < 60


def test_large_batches_are_not_guessed_for_and_steps_of_small_ones_keep_their_shape() -> None:
    driven = Driven(block_size=64, num_blocks=20, memory=1, step_tokens=64)
    for number in range(max(WIDTHS) + 1):
        driven.add([number + 1, 2, 3], max_tokens=40)
    driven.drain()
    assert driven.stepper.stats().guessed_tokens == 0
    driven = Driven(block_size=64, num_blocks=20, memory=1, step_tokens=64)
    driven.add([1, 2, 3], max_tokens=40)
    driven.drain()
    shapes = [len(sizes) for sizes in driven.runner.sizes[1:-2]]
    assert set(shapes) <= {1, 1 + WIDTHS[1]}
    assert shapes.count(1 + WIDTHS[1]) > 5
    assert sum(one != other for one, other in itertools.pairwise(shapes)) <= 2
