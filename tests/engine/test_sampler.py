"""Sampling is exact: whatever the filters, tokens come from the distribution that a plain softmax over all logits gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_runner import FakeResult
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from headrace.engine.candidates import UNDECIDED, Filters, draw, invert
from headrace.engine.sampler import Picked, SequenceSampler, sample_rows, score_rows, take_best
from headrace.errors import InvalidParameter, RequestFailed
from headrace.types import Sampling

V = 300
EOS = frozenset({0, 7})


def plain(logits: NDArray[Any], temperature: float = 1.0, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> NDArray[np.float64]:
    """The reference: a softmax over all logits, each filter on what the one before left."""
    order = np.argsort(-logits.astype(np.float64), kind="stable")
    values = logits.astype(np.float64)[order] / temperature
    p = np.exp(values - values.max())
    p /= p.sum()
    p[p < min_p * p[0]] = 0
    if top_k:
        p[top_k:] = 0
    p /= p.sum()
    if top_p < 1:
        p[1:][np.cumsum(p)[:-1] >= top_p] = 0
        p /= p.sum()
    back = np.empty_like(p)
    back[order] = p
    return back


def some_logits(seed: int, spread: float, size: int = V) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)


def sampler(
    choice: int = 0, prompt: Sequence[int] = (), generated: Sequence[int] = (), vocab_size: int = V, **asked: Any
) -> SequenceSampler:
    return SequenceSampler(
        Sampling(max_tokens=100, **asked),
        prompt,
        vocab_size=vocab_size,
        choice=choice,
        eos_ids=EOS,
        fallback_seed=11,
        generated=generated,
    )


def picked(one: Picked | Exception) -> Picked:
    assert isinstance(one, Picked), one
    return one


def tokens_of(picks: Sequence[Picked | Exception]) -> list[int]:
    return [picked(one).token for one in picks]


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spread=st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 40.0]),
    size=st.sampled_from([1, 5, 64, 65, V]),
    temperature=st.sampled_from([1e-5, 0.01, 0.5, 0.999, 1.0, 1.3, 2.0]),
    min_p=st.sampled_from([0.0, 0.001, 0.1, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 64, 70, 299, 1000]),
    # Odd enough for no sum of equal probabilities to hit them, where rounding would decide.
    top_p=st.sampled_from([0.0, 1e-9, 0.30013, 0.90013, 0.99913, 1.0]),
)
def test_inverts_the_reference_for_every_uniform_number(
    seed: int, spread: float, size: int, temperature: float, min_p: float, top_k: int, top_p: float
) -> None:
    logits = some_logits(seed, spread, size)
    result = FakeResult(logits[None])
    filters = Filters(temperature, min_p, top_k or size, top_p)
    grid = (np.arange(2000) + 0.5) / 2000
    repeat = np.zeros(len(grid), int)
    places = draw(result.top_logits[repeat], result.logsumexp[repeat], [filters] * len(grid), grid.tolist(), size)
    exact = [invert(logits, result.top_ids[0], filters, u) for u in grid]
    for place, token in zip(places, exact, strict=True):
        assert place == UNDECIDED or result.top_ids[0, place] == token
    # Points of a grid that fall into an interval are its length, but for one.
    shares = np.bincount(exact, minlength=size) / len(grid)
    wanted = plain(logits, temperature, min_p, top_k, top_p)
    if not spread:  # which of equals is taken is open
        shares, wanted = np.sort(shares), np.sort(wanted)
    assert np.abs(shares - wanted).max() <= 1.01 / len(grid)


@pytest.mark.parametrize(
    ("filters", "most"),
    [
        # The tail itself is 33 of 1000 here.
        (Filters(1.0, 0.0, 50_000, 1.0), 36),
        (Filters(0.7, 0.0, 50_000, 1.0), 10),
        (Filters(0.7, 0.0, 50_000, 0.9), 10),
        (Filters(1.2, 0.0, 40, 1.0), 0),
        (Filters(1.0, 0.05, 50_000, 1.0), 0),
    ],
)
def test_the_candidates_nearly_always_decide(filters: Filters, most: int) -> None:
    logits = some_logits(3, 6.0, 50_000)
    result = FakeResult(logits[None])
    grid = ((np.arange(1000) + 0.5) / 1000).tolist()
    repeat = np.zeros(len(grid), int)
    places = draw(result.top_logits[repeat], result.logsumexp[repeat], [filters] * len(grid), grid, 50_000)
    assert places.count(UNDECIDED) <= most


@pytest.mark.slow
@pytest.mark.parametrize("filters", [Filters(1.0, 0.0, 9000, 0.6), Filters(1.0, 0.0, 9000, 0.95), Filters(1.0, 0.0, 3000, 0.95)], ids=str)
def test_a_nucleus_of_thousands(filters: Filters) -> None:
    logits = some_logits(2, 0.5, 9000)
    head = FakeResult(logits[None]).top_ids[0]
    wanted = plain(logits, *filters)
    assert np.count_nonzero(wanted) > 2000
    counts = np.bincount([invert(logits, head, filters, (n + 0.5) / 8000) for n in range(8000)], minlength=9000)
    assert np.abs(counts / 8000 - wanted).max() <= 1.01 / 8000


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.5},
        {"top_k": 3},
        {"top_k": 100, "temperature": 1.5},
        {"top_p": 0.5},
        {"top_p": 0.97, "temperature": 1.4},
        {"min_p": 0.1},
        {"temperature": 0.8, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_frequencies_are_those_of_a_softmax(asked: dict[str, Any], spread: float) -> None:
    logits = some_logits(5, spread)
    result = FakeResult(logits[None])
    draws = 20_000
    counts = np.zeros(V)
    samplers = [sampler(choice=choice, seed=1, **asked) for choice in range(draws)]
    for first in range(0, draws, 500):
        counts += np.bincount(tokens_of(sample_rows(result, samplers[first : first + 500], [0] * 500)), minlength=V)
    expected = plain(logits, **asked) * draws
    assert counts[expected == 0].sum() == 0
    rare = expected < 5
    groups = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() >= 5:
        groups.append((counts[rare].sum(), expected[rare].sum()))
    got, wanted = np.array(groups).T
    assert len(got) == 1 or chisquare(got, wanted * got.sum() / wanted.sum()).pvalue > 1e-4


def test_successive_tokens_are_drawn_independently() -> None:
    result = FakeResult(np.log(np.array([[0.5, 0.3, 0.2]], np.float32)))
    one = sampler(seed=3, vocab_size=3)
    drawn = []
    for _ in range(6000):
        drawn += tokens_of(sample_rows(result, [one]))
        one.accept(drawn[-1])
    pairs = np.bincount(np.array(drawn[0::2]) * 3 + np.array(drawn[1::2]), minlength=9)
    p = np.array([0.5, 0.3, 0.2])
    assert chisquare(pairs, np.outer(p, p).ravel() * 3000).pvalue > 1e-4


def test_a_seeded_sequence_depends_on_nothing_else() -> None:
    logits = np.stack([some_logits(seed, 2.0) for seed in range(8)])
    alone = tokens_of(sample_rows(FakeResult(logits[3:4]), [sampler(seed=5)]))
    others = [sampler(seed=number, top_p=0.5) if number % 2 else sampler(temperature=0.0) for number in range(8)]
    others[3] = sampler(seed=5)
    assert tokens_of(sample_rows(FakeResult(logits), others))[3:4] == alone
    assert tokens_of(sample_rows(FakeResult(logits), [sampler(seed=5)], [3])) == alone


def test_seeds_choices_and_positions_give_different_numbers() -> None:
    numbers = {
        sampler(seed=seed, choice=choice, generated=[1] * n).uniform() for seed in range(10) for choice in range(10) for n in range(10)
    }
    assert len(numbers) == 1000
    assert sampler(seed=None).uniform() == sampler(seed=11).uniform()
    assert sampler(seed=-1).uniform() != sampler(seed=1).uniform()


def test_taking_up_again_goes_on_as_if_nothing_had_happened() -> None:
    asked = {"seed": 4, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "min_tokens": 6}
    one = sampler(prompt=[5, 6], **asked)
    past: list[int] = []
    for position in range(12):
        result = FakeResult(some_logits(position, 2.0)[None])
        again = sampler(prompt=[5, 6], generated=past, **asked)
        assert again.generated == one.generated == position
        token = tokens_of(sample_rows(result, [one]))
        assert tokens_of(sample_rows(result, [again])) == token
        one.accept(token[0])
        past += token


def test_greedy_takes_the_likeliest() -> None:
    logits = np.stack([some_logits(seed, 2.0) for seed in range(6)])
    greedy = sampler(temperature=0.0, top_p=0.1, top_k=100)
    assert not greedy.needs_full
    picks = sample_rows(FakeResult(logits), [greedy] * 6)
    assert tokens_of(picks) == logits.argmax(axis=1).tolist()
    tiny = sampler(temperature=5e-324)
    assert tokens_of(sample_rows(FakeResult(logits), [tiny] * 6)) == logits.argmax(axis=1).tolist()


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    prompt=st.lists(st.integers(0, 39), max_size=10),
    generated=st.lists(st.integers(0, 39), max_size=30),
    presence=st.sampled_from([-2.0, 0.0, 0.7, 2.0]),
    frequency=st.sampled_from([-2.0, 0.0, 0.4, 2.0]),
    repetition=st.sampled_from([0.5, 1.0, 1.3, 2.0]),
    bias=st.dictionaries(st.integers(0, 39), st.sampled_from([-99.0, -1.0, 0.5, 5.0, 100.0]), max_size=5),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_penalties_and_bias_against_a_plain_reference(
    seed: int,
    prompt: list[int],
    generated: list[int],
    presence: float,
    frequency: float,
    repetition: float,
    bias: dict[int, float],
    temperature: float,
) -> None:
    logits = some_logits(seed, 3.0, 40)
    wanted = logits.astype(np.float64)
    for token in range(40):
        if token in prompt or token in generated:
            wanted[token] = wanted[token] / repetition if wanted[token] > 0 else wanted[token] * repetition
        wanted[token] -= frequency * generated.count(token)
        wanted[token] -= presence * (token in generated)
        wanted[token] += bias.get(token, 0)
    asked = {"presence_penalty": presence, "frequency_penalty": frequency, "repetition_penalty": repetition, "logit_bias": bias}
    one = sampler(prompt=prompt, generated=generated, vocab_size=40, temperature=temperature, **asked)
    np.testing.assert_allclose(one.change(logits), wanted, rtol=1e-12, atol=1e-12)
    assert one.needs_full == bool(presence or frequency or repetition != 1 or bias)
    (pick,) = sample_rows(FakeResult(logits[None]), [one])
    if temperature == 0:
        assert wanted[picked(pick).token] == wanted.max()
    else:
        cumulative = np.cumsum(plain(wanted, temperature)[order := np.argsort(-wanted, kind="stable")])
        place = order.tolist().index(picked(pick).token)
        assert (cumulative[place - 1] if place else 0) - 1e-12 <= one.uniform() <= cumulative[place] + 1e-12


def test_penalised_rows_are_filtered_too() -> None:
    logits = some_logits(9, 2.0)
    result = FakeResult(logits[None])
    asked = {"temperature": 1.1, "top_k": 10, "top_p": 0.8}
    samplers = [sampler(choice=choice, logit_bias={4: 6.0}, **asked) for choice in range(4000)]
    counts = np.bincount(tokens_of(sample_rows(result, samplers, [0] * 4000)), minlength=V)
    changed = logits.copy()
    changed[4] += 6.0
    expected = plain(changed, **asked)
    assert counts[expected == 0].sum() == 0
    assert chisquare(counts[expected > 0], expected[expected > 0] * 4000).pvalue > 1e-4


def test_a_bias_of_minus_100_bans_and_of_100_decides() -> None:
    logits = np.zeros(V, np.float32)
    logits[3] = 200.0
    result = FakeResult(logits[None])
    for temperature in (0.0, 1e-4, 2.0):
        assert tokens_of(sample_rows(result, [sampler(logit_bias={3: -100.0}, temperature=temperature)])) != [3]
        bias = {3: -100.0, 9: 100.0}
        assert tokens_of(sample_rows(result, [sampler(logit_bias=bias, temperature=temperature)])) == [9]


def test_no_end_before_min_tokens() -> None:
    logits = np.zeros(V, np.float32)
    logits[[0, 7, 9]] = [30.0, 20.0, 10.0]
    result = FakeResult(logits[None])

    def next_token(**asked: Any) -> list[int]:
        return tokens_of(sample_rows(result, [sampler(temperature=0.0, **asked)]))

    assert next_token() == [0]
    assert next_token(min_tokens=2) == [9]
    assert next_token(min_tokens=2, generated=[1, 1]) == [0]
    assert next_token(min_tokens=2, stop_token_ids=(9,)) not in ([0], [7], [9])
    assert next_token(min_tokens=2, ignore_eos=True) == [0]
    assert next_token(min_tokens=2, ignore_eos=True, stop_token_ids=(0, 10**9)) == [7]
    assert sampler(min_tokens=2).needs_full
    assert not sampler(min_tokens=2, generated=[1, 1]).needs_full


def test_an_error_belongs_to_its_row() -> None:
    logits = np.stack([some_logits(seed, 2.0, 5) for seed in range(5)])
    logits[1, 2] = np.nan
    logits[2, 2] = np.inf
    with np.errstate(all="ignore"):
        result = FakeResult(logits)
    ban = dict.fromkeys(range(5), -100.0)
    samplers = [sampler(seed=1, vocab_size=5) for _ in range(5)]
    samplers[3] = sampler(seed=1, vocab_size=5, logit_bias=ban)
    picks = sample_rows(result, samplers)
    assert isinstance(picks[1], RequestFailed)
    assert isinstance(picks[2], RequestFailed)
    assert isinstance(picks[3], InvalidParameter)
    alone = tokens_of(sample_rows(FakeResult(logits[[0, 4]]), [samplers[0], samplers[4]]))
    assert tokens_of([picks[0], picks[4]]) == alone


def test_a_bias_outside_the_vocabulary_is_refused() -> None:
    for token in (-1, V):
        with pytest.raises(InvalidParameter, match=str(token)):
            sampler(logit_bias={token: 1.0})


def test_logprobs_are_the_models_own() -> None:
    logits = some_logits(1, 3.0)
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    order = np.argsort(-wanted, kind="stable")
    result = FakeResult(logits[None])
    for asked in ({"temperature": 0.3, "top_p": 0.5}, {"temperature": 2.0, "logit_bias": {5: 3.0}}, {"temperature": 0.0, "min_tokens": 2}):
        one = picked(sample_rows(result, [sampler(logprobs=20, **asked)])[0])
        assert one.logprob == pytest.approx(wanted[one.token], abs=1e-5)
        assert [token for token, _ in one.top] == order[:20].tolist()
        np.testing.assert_allclose([logprob for _, logprob in one.top], wanted[order[:20]], atol=1e-5)
    assert picked(sample_rows(result, [sampler(logprobs=0)])[0]).top == ()
    more = picked(sample_rows(result, [sampler(logprobs=100)])[0]).top
    assert [token for token, _ in more] == order[:100].tolist()


def test_scores_of_given_tokens() -> None:
    logits = np.stack([some_logits(seed, 3.0) for seed in range(4)])
    wanted = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    order = np.argsort(-wanted, axis=1, kind="stable")
    targets = [int(order[1, 0]), int(order[2, V - 1])]
    scored = score_rows(FakeResult(logits), [1, 2], targets, 2)
    assert [one.token for one in scored] == targets
    for row, one in zip((1, 2), scored, strict=True):
        assert one.logprob == pytest.approx(wanted[row, one.token], abs=1e-5)
        assert [token for token, _ in one.top] == order[row, :2].tolist()
    assert score_rows(FakeResult(logits), [0], [3], 0)[0].top == ()
    assert score_rows(FakeResult(logits), [], [], 3) == []
    logits[1, 0] = np.nan
    with np.errstate(all="ignore"), pytest.raises(RequestFailed):
        score_rows(FakeResult(logits), [1], [2], 0)


def test_the_best_alone_are_those_that_greedy_samplers_draw() -> None:
    rng = np.random.default_rng(5)
    result = FakeResult(rng.normal(size=(4, V)).astype(np.float32))
    samplers = [sampler(temperature=0.0) for _ in range(4)]
    drawn = [picked.token for picked in sample_rows(result, samplers) if isinstance(picked, Picked)]
    assert [picked.token for picked in take_best(result) if isinstance(picked, Picked)] == drawn
    assert [picked.token for picked in take_best(result, [2, 0, 2]) if isinstance(picked, Picked)] == [drawn[2], drawn[0], drawn[2]]
    result.top_logits[1] = np.nan
    sound = take_best(result)
    assert isinstance(sound[1], RequestFailed)
    assert [picked.token for picked in (sound[0], *sound[2:]) if isinstance(picked, Picked)] == [drawn[0], *drawn[2:]]
