"""What the engine does with requests, over a model that notices every mistake with blocks and positions."""

from __future__ import annotations

import random

import pytest
from driven import Driven
from fake_runner import EOS, LETTERS, VOCABULARY, greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import DeadlineExceeded, EngineDied, RequestFailed


def prompt(length: int, seed: int = 1) -> list[int]:
    chooser = random.Random(seed)
    return [chooser.randrange(1, VOCABULARY) for _ in range(length)]


def letters_only(length: int, count: int) -> list[int]:
    """A prompt whose greedy completion has no end of text in its first tokens, and no letter twice in ten."""
    for seed in range(999):
        letters = greedy(prompt(length, seed), count)
        if EOS not in letters and len(set(letters[:10])) == 10:
            return prompt(length, seed)
    raise AssertionError("no such prompt")


def test_long_prompts_go_in_chunks_beside_decodes() -> None:
    driven = Driven(step_tokens=16)
    first = driven.add(prompt(3), max_tokens=20)
    driven.step()
    second = driven.add(prompt(70, seed=2))
    driven.drain()
    assert first.tokens() == greedy(prompt(3), 20)
    assert second.tokens() == greedy(prompt(70, seed=2), 5)
    assert max(sum(sizes) for sizes in driven.runner.sizes) == 16
    assert driven.runner.sizes[1:5] == [[1, 15]] * 4
    assert len(first.deltas()) == 20


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 31, 32, 33])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_the_prefix_cache_changes_nothing_but_the_work(length: int, prefix_cache: bool) -> None:
    driven = Driven(prefix_cache=prefix_cache)
    for again in (False, True):
        answer = driven.add(prompt(length))
        driven.drain()
        assert answer.tokens() == greedy(prompt(length), 5)
        assert answer.report is not None
        # All but the last token, which is computed for its logits; partial blocks aren't cached.
        expected = min(length // 4 * 4, length - 1) if again and prefix_cache else 0
        assert answer.report.cached_tokens == expected
    computed = sum(driven.runner.sizes[-5])
    assert computed == length - expected or length > 16


def test_a_conversation_goes_on_from_its_own_answer() -> None:
    driven = Driven()
    first = driven.add(prompt(10), max_tokens=11)
    driven.drain()
    driven.add(prompt(10) + first.tokens() + prompt(3, seed=2))
    driven.drain()
    report = driven.answers["request-1"].report
    assert report is not None
    assert report.cached_tokens == 20
    assert driven.answers["request-1"].tokens() == greedy(prompt(10) + first.tokens() + prompt(3, seed=2), 5)


def test_no_tenant_reads_anothers_cache() -> None:
    driven = Driven()
    for tenant in (1, 2, 1):
        driven.add(prompt(20), tenant=tenant)
        driven.drain()
    assert [answer.report and answer.report.cached_tokens for answer in driven.answers.values()] == [0, 0, 19]


def test_prompts_that_arrive_together_share_the_work() -> None:
    driven = Driven(step_tokens=64)
    for number in range(4):
        driven.add([*prompt(20), number + 1])
    driven.drain()
    assert driven.runner.sizes[:2] == [[21], [1, 1, 1, 1]]
    for number in range(4):
        assert driven.answers[f"request-{number}"].tokens() == greedy([*prompt(20), number + 1], 5)


def test_who_waits_for_a_block_computes_it_when_its_computation_is_cancelled() -> None:
    driven = Driven(step_tokens=16)
    driven.add(prompt(60), name="first")
    second = driven.add(prompt(60))
    driven.step()
    driven.stepper.cancel("first")
    driven.drain()
    assert second.tokens() == greedy(prompt(60), 5)
    assert driven.answers["first"].tokens() == []


@pytest.mark.parametrize("length", [6, 8])
def test_choices_share_their_prompt_and_part_ways(length: int) -> None:
    driven = Driven(max_sequences=16)
    answer = driven.add(prompt(length), n=8, temperature=1.0, seed=7, max_tokens=9)
    driven.step()
    assert driven.stepper.stats().running == 8
    assert driven.stepper.stats().blocks_used == (1 + 8 if length == 6 else 2)
    driven.drain()
    assert driven.runner.copies == (7 if length == 6 else 0)
    assert sum(driven.runner.sizes[0]) == length
    assert len({tuple(answer.tokens(choice)) for choice in range(8)}) == 8
    alone = Driven(max_sequences=3)
    same = alone.add(prompt(length), n=8, temperature=1.0, seed=7, max_tokens=9)
    alone.drain()
    assert [same.tokens(choice) for choice in range(8)] == [answer.tokens(choice) for choice in range(8)]
    assert answer.report is not None
    assert answer.report.completion_tokens == 72


def test_preemption_repeats_nothing_and_loses_nothing() -> None:
    for prefix_cache in (True, False):
        driven = Driven(num_blocks=12, context_length=48, prefix_cache=prefix_cache)
        answers = [driven.add(prompt(6, seed), max_tokens=30) for seed in range(4)]
        driven.drain()
        assert driven.stepper.stats().preemptions > 0
        for seed, answer in enumerate(answers):
            assert answer.tokens() == greedy(prompt(6, seed), 30)


def test_preemption_takes_the_latest_of_the_most_served_tenant() -> None:
    driven = Driven(num_blocks=9, context_length=36)
    driven.add(prompt(4, 1), tenant=1, max_tokens=24, name="early")
    driven.add(prompt(4, 2), tenant=1, max_tokens=24, name="late")
    driven.step()
    driven.add(prompt(4, 3), tenant=2, max_tokens=24, name="other")
    while not driven.stepper.stats().preemptions:
        driven.step()
    tenants = driven.stepper._scheduler.tenants
    assert [sequence.job.id for sequence in tenants[1].waiting] == ["late"]
    driven.drain()
    assert driven.answers["late"].tokens() == greedy(prompt(4, 2), 24)


def test_the_blocks_there_are_bound_a_sequence() -> None:
    driven = Driven(num_blocks=5, context_length=1000)
    answer = driven.add(prompt(10), max_tokens=500)
    driven.drain()
    assert answer.tokens() == greedy(prompt(10), 10)
    assert answer.last().finish == "length"
    full = driven.add(prompt(19), max_tokens=500)
    driven.drain()
    again = driven.add(prompt(19), max_tokens=500)
    driven.drain()
    assert full.tokens() == again.tokens() == greedy(prompt(19), 1)


def test_the_end_of_text_ends_a_completion() -> None:
    start = next(p for p in ([a, b] for a in range(1, 90) for b in range(1, 90)) if EOS in greedy(p, 12)[3:])
    driven = Driven()
    answer = driven.add(start, ignore_eos=False, max_tokens=50)
    ignoring = driven.add(start, max_tokens=20)
    stopping = driven.add(start, max_tokens=50, stop_token_ids=(greedy(start, 3)[1],))
    driven.drain()
    expected = greedy(start, 50, ignore_eos=False)
    assert answer.tokens() == expected
    assert expected[-1] == EOS
    assert (answer.last().finish, answer.last().stop_reason) == ("stop", None)
    assert answer.text() == "".join(LETTERS[token] for token in expected[:-1])
    assert (ignoring.tokens(), ignoring.last().finish) == (greedy(start, 20), "length")
    token = greedy(start, 3)[1]
    count = greedy(start, 3).index(token) + 1
    assert stopping.tokens() == greedy(start, count)
    assert (stopping.last().finish, stopping.last().stop_reason) == ("stop", token)
    assert len(stopping.text()) == count - 1


def test_a_stop_string_is_never_shown_and_its_tokens_are_counted() -> None:
    expected = greedy(letters_only(5, 20), 20)
    text = "".join(LETTERS[token] for token in expected)
    driven = Driven()
    answer = driven.add(letters_only(5, 20), max_tokens=20, stop=(text[8:11], "\N{SNOWMAN}"))
    driven.drain()
    assert answer.text() == text[:8]
    assert answer.tokens() == expected[:11]
    assert (answer.last().finish, answer.last().stop_reason) == ("stop", text[8:11])
    assert [len(delta.tokens) for delta in answer.deltas()] == [1] * 11


def test_text_held_back_comes_at_the_end() -> None:
    text = "".join(LETTERS[token] for token in greedy(letters_only(5, 20), 10))
    assert text[8] not in text[:8] + text[9]
    driven = Driven()
    answer = driven.add(letters_only(5, 20), max_tokens=10, stop=(text[8:] + "\N{SNOWMAN}",))
    driven.drain()
    assert answer.text() == text
    assert [delta.text for delta in answer.deltas()][-3:] == [text[7], "", text[8:]]


def test_nothing_stops_before_min_tokens() -> None:
    expected = greedy(letters_only(5, 20), 12)
    text = "".join(LETTERS[token] for token in expected)
    driven = Driven()
    answer = driven.add(letters_only(5, 20), max_tokens=12, min_tokens=6, stop=(text[2], text[9]))
    driven.drain()
    stopped = next(at for at in range(5, 12) if text[at] in (text[2], text[9]))
    assert answer.text() == text[:stopped]
    assert len(answer.tokens()) == stopped + 1


def test_logprobs_name_the_token_and_its_rivals() -> None:
    driven = Driven()
    answer = driven.add(prompt(5), logprobs=3, max_tokens=4)
    driven.drain()
    for delta in answer.deltas():
        (scored,) = delta.logprobs
        assert (scored.token,) == delta.tokens
        assert scored.text.encode() == scored.raw == LETTERS[scored.token].encode()
        assert len(scored.top) == 3
        assert scored.top[0][:2] == (scored.token, pytest.approx(scored.logprob))
        assert scored.logprob < 0


@pytest.mark.parametrize(
    ("asked", "best_only"),
    [
        ({}, True),
        ({"stop": ("@",)}, True),
        ({"temperature": 0.5}, False),
        ({"logprobs": 0}, False),
        ({"presence_penalty": 1.0}, False),
        ({"logit_bias": {3: 1.0}}, False),
        ({"prompt_logprobs": 0}, False),
    ],
)
def test_candidates_are_computed_where_something_is_asked_of_them(asked: dict[str, object], best_only: bool) -> None:
    driven = Driven()
    driven.add(prompt(5), max_tokens=4, **asked)
    driven.drain()
    assert driven.runner.best_only[0] is best_only
    beside = Driven()
    beside.add(prompt(5), max_tokens=4)
    beside.add(prompt(6), max_tokens=4, **asked)
    beside.drain()
    assert (False in beside.runner.best_only) is not best_only


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_prompt_scores_are_computed_for_every_position(max_tokens: int) -> None:
    driven = Driven(step_tokens=16, num_blocks=128, context_length=400)
    driven.add(prompt(50))
    driven.drain()
    answer = driven.add(prompt(50), prompt_logprobs=2, max_tokens=max_tokens)
    driven.drain()
    assert answer.scores is not None
    assert answer.report is not None
    assert answer.report.cached_tokens == 0
    scores = answer.scores.scores
    assert len(scores) == 50
    assert scores[0] is None
    for at, scored in enumerate(scores[1:], 1):
        logits = driven.runner.forward_alone(prompt(50)[:at])
        assert scored is not None
        assert scored.token == prompt(50)[at]
        assert scored.logprob == pytest.approx(logits[scored.token], abs=1e-4)
        assert [entry[0] for entry in scored.top] == sorted(range(VOCABULARY), key=lambda token: -logits[token])[:2]
    assert answer.tokens() == greedy(prompt(50), max_tokens)
    assert answer.last().finish == "length"
    assert answer.events.index(answer.scores) == 0


def test_a_scored_prompt_of_one_token() -> None:
    driven = Driven()
    answer = driven.add([5], prompt_logprobs=0, max_tokens=0)
    driven.drain()
    assert answer.scores is not None
    assert answer.scores.scores == (None,)


def test_few_positions_are_scored_in_one_step() -> None:
    driven = Driven(step_tokens=512, num_blocks=256, context_length=1000)
    driven.add(prompt(300), prompt_logprobs=0, max_tokens=0)
    driven.add(prompt(300, 2), prompt_logprobs=0, max_tokens=0)
    driven.drain()
    assert max(sum(sizes) for sizes in driven.runner.sizes) <= 129


def test_cancel_frees_a_request_in_every_state() -> None:
    driven = Driven(max_sequences=1, step_tokens=16)
    driven.add(prompt(10), name="decoding", max_tokens=100)
    driven.add(prompt(10), name="waiting")
    driven.step()
    driven.step()
    driven.stepper.cancel("waiting")
    driven.stepper.cancel("decoding")
    driven.stepper.cancel("unknown")
    assert driven.stepper.stats().blocks_used == 0
    driven.add(prompt(50), name="prefilling")
    driven.step()
    assert driven.stepper.stats().blocks_used > 0
    driven.stepper.cancel("prefilling")
    driven.step()
    driven.clean()
    reports = [answer.report for answer in driven.answers.values()]
    assert [report and report.completion_tokens for report in reports] == [2, 0, 0]


@pytest.mark.parametrize(("steps", "phase"), [(0, "waiting in the queue"), (1, "in prefill"), (6, "decoding")])
def test_a_deadline_says_where_the_time_went(steps: int, phase: str) -> None:
    driven = Driven(max_sequences=1)
    driven.add(prompt(3, 9), max_tokens=100, name="holder") if steps == 0 else None
    driven.step()
    answer = driven.add(prompt(40), timeout=2.0, max_tokens=100)
    driven.now += 0.5
    for _ in range(steps):
        driven.step()
    driven.now += 1.5
    driven.step()
    assert isinstance(answer.error, DeadlineExceeded)
    assert phase in answer.error.message
    assert ("2.00" if steps == 0 else "0.50") + " s in the queue" in answer.error.message
    driven.stepper.cancel("holder")
    driven.step()
    driven.clean()


def test_a_poisonous_request_fails_alone() -> None:
    driven = Driven(step_tokens=64)
    driven.runner.poison = 7
    safe = [[token for token in prompt(9, seed) if token != 7] for seed in range(5)]
    good = [driven.add(tokens, max_tokens=1) for tokens in safe]
    bad = driven.add([*prompt(6, 9), 7])
    late = driven.add([5, 6], logit_bias={7: 100.0}, max_tokens=3)
    driven.drain()
    assert [answer.tokens() for answer in good] == [greedy(tokens, 1) for tokens in safe]
    assert isinstance(bad.error, RequestFailed)
    assert "poison" in bad.error.message
    assert late.tokens()[0] == 7
    assert isinstance(late.error, RequestFailed)
    driven.runner.poison = None
    after = driven.add(prompt(9))
    driven.drain()
    assert after.tokens() == greedy(prompt(9), 5)


def test_a_broken_device_ends_the_engine() -> None:
    driven = Driven()
    answer = driven.add(prompt(3))
    driven.runner.broken = True
    with pytest.raises(EngineDied):
        driven.step()
    driven.runner.broken = False
    assert isinstance(driven.stepper.outbox[-1][1], RequestFailed)
    assert answer.tokens() == []


def test_text_that_cannot_be_made_fails_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = Driven()
    good, bad = driven.add(prompt(5)), driven.add(prompt(5, 2), stop=("x",))
    driven.step()

    def fail(piece: str) -> tuple[str, str | None]:
        raise RuntimeError("no text")

    monkeypatch.setattr("headrace.engine.stops.StopStrings.push", lambda self, piece: fail(piece))
    driven.drain()
    assert good.tokens() == greedy(prompt(5), 5)
    assert isinstance(bad.error, RequestFailed)


workload = st.lists(
    st.tuples(
        st.integers(0, 12),  # when, in steps
        st.integers(1, 40),  # prompt tokens
        st.integers(1, 3),  # prompt's family: prefixes are shared
        st.integers(0, 2),  # tenant
        st.integers(1, 30),  # max_tokens
        st.sampled_from([1, 1, 1, 2, 5]),  # n
        st.sampled_from([None, None, None, 2, 9]),  # cancelled after so many steps
        st.booleans(),  # scored
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None)
@given(workload, st.integers(18, 40), st.integers(1, 9), st.booleans(), st.integers(0, 2))
def test_any_workload_gives_each_request_what_it_gets_alone(
    work: list[tuple[int, int, int, int, int, int, int | None, bool]],
    num_blocks: int,
    max_sequences: int,
    prefix_cache: bool,
    memory: int,
) -> None:
    driven = Driven(num_blocks=num_blocks, max_sequences=max_sequences, prefix_cache=prefix_cache, context_length=70, memory=memory)
    cancels: list[tuple[int, str]] = []
    step = 0
    for when, length, family, tenant, max_tokens, n, cancelled, scored in sorted(work, key=lambda item: item[0]):
        while step < when:
            driven.step()
            step += 1
            for at, name in cancels:
                if at == step:
                    driven.stepper.cancel(name)
        name = f"request-{len(driven.answers)}"
        driven.add(
            prompt(length, family),
            tenant=tenant,
            max_tokens=max_tokens,
            n=n,
            prompt_logprobs=1 if scored else None,
        )
        if cancelled is not None:
            cancels.append((step + cancelled, name))
    while not driven.stepper.idle:
        driven.step()
        step += 1
        assert step < 3000
        stats = driven.stepper.stats()
        assert stats.running <= max_sequences
        for at, name in cancels:
            if at == step:
                driven.stepper.cancel(name)
    driven.step()
    driven.clean()
    stopped = {name for _, name in cancels}
    assert all(answer.report is not None for answer in driven.answers.values())
    for name, (_, length, family, _, max_tokens, n, _, scored) in zip(driven.answers, sorted(work, key=lambda item: item[0]), strict=True):
        answer = driven.answers[name]
        expected = greedy(prompt(length, family), max_tokens, memory=memory)
        for choice in range(n):
            if name in stopped:
                assert answer.tokens(choice) == expected[: len(answer.tokens(choice))]
            else:
                assert answer.tokens(choice) == expected
                assert answer.last(choice).finish == "length"
                assert not scored or (answer.scores is not None and len(answer.scores.scores) == length)
