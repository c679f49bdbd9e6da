"""Tenants share the engine by tokens served, and a newcomer's first token doesn't wait behind a flood."""

from __future__ import annotations

import pytest
from driven import Driven
from fake_runner import greedy
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.engine.pace import BRISK, EVEN, EXPRESS_PREFILL, LEAST_PREFILL, RELAXED, Pace
from headrace.engine.sequence import Job, Sequence
from headrace.engine.tenants import Tenants
from headrace.types import GenerateRequest, Sampling


def flood(driven: Driven, count: int, *, tenant: int, tokens: int = 12, max_tokens: int = 20) -> None:
    for number in range(count):
        driven.add([tenant + 1] * (tokens - 1) + [number + 1], tenant=tenant, max_tokens=max_tokens)


def let_decode(driven: Driven, count: int) -> None:
    """Of tenant 1; steps are counted from then on."""
    flood(driven, count, tenant=1, max_tokens=60)
    while driven.stepper._scheduler.prefilling or driven.stepper._scheduler.waiting:
        driven.step()
    driven.runner.sizes.clear()


def steps_to_first_token(driven: Driven, tenant: int) -> int:
    answer = driven.add([70 + tenant, 3, 4], tenant=tenant)
    for step in range(1, 100):
        driven.step()
        if answer.tokens():
            return step
    raise AssertionError("no first token")


def test_a_newcomer_gets_a_slot_from_a_tenant_that_holds_them_all() -> None:
    driven = Driven(max_sequences=8, num_blocks=200)
    flood(driven, 64, tenant=1, max_tokens=60)
    for _ in range(20):
        driven.step()
    assert driven.stepper.stats().running == 8
    assert [steps_to_first_token(driven, tenant) for tenant in (2, 3, 4)] == [1, 1, 1]
    driven.drain()
    for number in range(64):
        assert driven.answers[f"request-{number}"].tokens() == greedy([2] * 11 + [number + 1], 60)


def test_a_newcomer_gets_blocks_from_a_tenant_that_holds_them_all() -> None:
    driven = Driven(max_sequences=8, num_blocks=24)
    flood(driven, 16, tenant=1)
    for _ in range(9):
        driven.step()
    assert steps_to_first_token(driven, 2) == 1
    driven.drain()


def test_one_sequence_is_never_thrown_out_for_a_newcomer() -> None:
    driven = Driven(max_sequences=1)
    first = driven.add([1, 2, 3], tenant=1, max_tokens=20)
    driven.step()
    second = driven.add([4, 5, 6], tenant=2)
    driven.drain()
    assert driven.stepper.stats().preemptions == 0
    assert first.tokens() == greedy([1, 2, 3], 20)
    assert second.tokens() == greedy([4, 5, 6], 5)


def test_prompts_of_two_tenants_take_turns() -> None:
    driven = Driven(step_tokens=16, num_blocks=200)
    flood(driven, 20, tenant=1, tokens=16, max_tokens=1)
    flood(driven, 3, tenant=2, tokens=16, max_tokens=1)
    for _ in range(7):
        driven.step()
    assert all(driven.answers[f"request-{number}"].ended for number in (20, 21, 22))
    driven.drain()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 20)), min_size=4, max_size=40))
def test_backlogged_tenants_are_served_alike(work: list[tuple[int, int, int]]) -> None:
    """While two tenants both wait, neither is served more than one batch's worth beyond the other."""
    driven = Driven(step_tokens=16, max_sequences=4, num_blocks=300)
    for number, (tenant, tokens, max_tokens) in enumerate(work):
        driven.add([tenant] * tokens + [number + 1], tenant=tenant, max_tokens=max_tokens)
    scheduler = driven.stepper._scheduler
    # A batch: a step's prompt tokens, and all that sequences admitted together still bring.
    batch = 16 + 4 * (31 + 2 * 20)
    while not driven.stepper.idle:
        driven.step()
        counters = [tenant.counter for tenant in scheduler.tenants.active() if tenant.waiting]
        assert not counters or max(counters) - min(counters) <= batch
    driven.clean()


def sequence(tenant: int) -> Sequence:
    request = GenerateRequest(id="x", prompt=[1], sampling=Sampling(max_tokens=1), tenant=tenant)
    return Sequence(Job(request, lambda events: None, order=1, received_at=0.0, context_length=9), 0, b"")


def test_being_idle_earns_no_credit() -> None:
    tenants = Tenants()
    busy = tenants.enter(1)
    busy.waiting.append(sequence(1))
    busy.counter = 500.0
    assert tenants.enter(2).counter == 500.0
    tenants[2].counter = 900.0
    tenants.leave_if_idle(2)
    assert tenants.enter(2).counter == 900.0
    tenants.leave_if_idle(2)
    busy.counter = 1000.0
    assert tenants.enter(2).counter == 1000.0
    busy.waiting.clear()
    tenants.leave_if_idle(1)
    tenants.leave_if_idle(2)
    assert tenants.enter(3).counter == 1000.0


def test_the_pace_is_learnt_and_outlives_steps_of_one_size() -> None:
    pace = Pace()
    assert pace.room(BRISK, 0) > 10_000
    for tokens in (200, 60, 1, 200, 60, 16, 1):
        pace.note(tokens, 0.008 + tokens * 0.0006)
    for _ in range(500):
        pace.note(16, 0.008 + 16 * 0.0006)
    assert abs(pace.per_token - 0.0006) < 0.0002
    assert abs(pace.seconds(16) - 0.0176) < 0.001
    assert 40 <= pace.room(BRISK, 16) <= 70
    pace.note(16, 60.0)
    assert pace.seconds(16) < 0.03


def test_what_a_step_with_prompts_costs_before_its_tokens_isnt_taken_for_a_price_of_tokens() -> None:
    pace = Pace()

    def step(tokens: int, prompts: bool) -> None:
        pace.note(tokens, 0.02 + 0.04 * prompts + tokens * 0.001, prompts=prompts)

    for tokens in (160, 40, 16):
        step(tokens, tokens > 16)
    for _ in range(100):
        for _ in range(3):
            step(16, False)
        step(16 + min(512, pace.room(RELAXED, 16)), True)
    pace.saved = 0.0
    assert 90 <= pace.room(RELAXED, 16) <= 110


def test_short_steps_make_room_for_a_long_one_and_long_ones_for_none() -> None:
    pace = Pace()
    for tokens in (200, 60, 1, 200, 60, 16, 1):
        pace.note(tokens, 0.02 + tokens * 0.0005, prompts=tokens > 20)
    for _ in range(10):
        pace.note(16, 0.028)
    long = pace.room(RELAXED, 16)
    assert 700 <= long <= 900
    assert pace.room(BRISK, 16) <= 70, "others wait for the end of the step"
    for _ in range(5):
        pace.note(360, 0.2, prompts=True)
    assert 250 <= pace.room(RELAXED, 16) <= 350


@pytest.mark.parametrize("waiting", [20, 40])
def test_prompts_that_would_fill_the_slots_are_taken_evenly_and_not_in_one_wave(waiting: int) -> None:
    driven = Driven(max_sequences=64, step_tokens=512, num_blocks=800)
    let_decode(driven, 8)
    pace = driven.stepper._pace
    pace.per_token, pace.fixed = 0.001, 0.01
    pace.note = lambda tokens, seconds, **_: None  # type: ignore[method-assign]
    for number in range(waiting):
        driven.add([number + 1] * 30, tenant=1, max_tokens=20)
    driven.step()
    assert pace.room(EVEN, 8) < pace.room(RELAXED, 8)
    haste = EVEN if waiting + 8 > 64 / 2 else RELAXED
    assert sum(driven.runner.sizes[0]) == 8 + pace.room(haste, 8)
    driven.drain()


def test_a_long_batch_of_others_sits_out_a_newcomers_step_but_never_two() -> None:
    driven = Driven(max_sequences=32, step_tokens=256, num_blocks=400)
    let_decode(driven, 31)
    pace = driven.stepper._pace
    pace.per_token, pace.fixed = 0.001, 0.008
    pace.note = lambda tokens, seconds, **_: None  # type: ignore[method-assign]
    driven.add([*range(1, 91), *range(1, 61)], tenant=2)
    for _ in range(3):
        driven.step()
    # What an express step always has room for; then, beside the decodes, what is left: too little to be cut in two.
    assert driven.runner.sizes[:2] == [[EXPRESS_PREFILL], [1] * 31 + [150 - EXPRESS_PREFILL]]
    driven.drain()
    let_decode(driven, 31)
    driven.add([*range(1, 91), *range(1, 91), *range(1, 121)], tenant=2)
    for _ in range(3):
        driven.step()
    # Of a long one, beside the decodes, what is never denied.
    rest = 300 - EXPRESS_PREFILL - LEAST_PREFILL
    assert driven.runner.sizes == [[EXPRESS_PREFILL], [1] * 31 + [LEAST_PREFILL], [min(rest, EXPRESS_PREFILL)]]
    driven.drain()


@pytest.mark.parametrize("length", [80, 3])
def test_a_short_prompt_of_a_newcomer_isnt_cut_in_two_for_brisk_steps(length: int) -> None:
    driven = Driven(max_sequences=32, step_tokens=256, num_blocks=400)
    let_decode(driven, 4)
    pace = driven.stepper._pace
    pace.per_token, pace.fixed = 0.001, 0.008
    pace.note = lambda tokens, seconds, **_: None  # type: ignore[method-assign]
    flood(driven, 1, tenant=1, tokens=100)
    driven.add([*range(1, length + 1)], tenant=2)
    driven.step()
    assert pace.room(BRISK, 4) < 80
    # The newcomer's first; of what else waits only what a step always has room for.
    assert driven.runner.sizes[0][4] == length
    assert sum(driven.runner.sizes[0][5:]) == (LEAST_PREFILL if length == 3 else 0)
    driven.drain()
