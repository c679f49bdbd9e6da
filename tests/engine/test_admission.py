"""Admission: its arithmetic by properties, and what it makes of an overload in virtual time."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from overloaded_engine import FIXED, PER_TOKEN, OverloadedEngine, goodput, steady

from headrace.config import OverloadSection
from headrace.engine.pace import Pace
from headrace.errors import DeadlineExceeded, DeadlineUnmeetable, HeadraceError, QueueFull, QueueShareFull, Shed, WaitTooLong
from headrace.types import PATIENT, PRIORITIES, PROMPT
from headrace.waiting import (
    BURST,
    Bounds,
    Line,
    Newcomer,
    Place,
    Queue,
    is_full,
    no_room,
    place,
    predicted_wait,
    rank_of,
    slot_wait,
    who_gives_way,
)

_LINES = st.lists(
    st.builds(
        Line,
        tenant=st.integers(0, 5),
        rank=st.integers(0, 5),
        requests=st.integers(1, 50),
        sequences=st.integers(1, 200),
        tokens=st.integers(1, 100_000),
    ),
    max_size=12,
    unique_by=lambda line: (line.tenant, line.rank),
).map(tuple)
_QUEUES = st.builds(
    Queue,
    lines=_LINES,
    slots=st.integers(0, 64),
    running=st.integers(0, 64),
    frees=st.lists(st.floats(0, 60), max_size=64).map(lambda values: tuple(sorted(values))),
    seconds_each=st.floats(0, 60),
    speed=st.floats(0, 1e5).map(lambda speed: speed if speed > 1 else 0.0),
    token_seconds=st.floats(0, 1),
    step_fixed=st.floats(0, 1),
    step_each=st.floats(0, 1),
    length=st.floats(0, 1000),
    share=st.floats(0, 1),
    flooded=st.booleans(),
    limit=st.floats(0, 5),
)
_NEWCOMERS = st.builds(
    Newcomer,
    tenant=st.integers(0, 6),
    priority=st.sampled_from(PRIORITIES),
    tokens=st.integers(1, 10_000),
    sequences=st.integers(1, 16),
    certain=st.integers(0, 1000),
    timeout=st.none() | st.floats(0.01, 1000),
    most=st.integers(0, 1000),
)
BOUNDS = Bounds(100, 100_000, 60.0)


@given(_QUEUES, _NEWCOMERS, st.integers(0, 4))
def test_a_higher_rank_never_waits_longer(queue: Queue, newcomer: Newcomer, rank: int) -> None:
    assert predicted_wait(queue, newcomer, rank + 1) <= predicted_wait(queue, newcomer, rank) + 1e-9


@given(_QUEUES, _NEWCOMERS, st.integers(0, 5), st.integers(1, 1000))
def test_another_tenants_crowd_costs_no_more_than_ones_own(queue: Queue, newcomer: Newcomer, rank: int, crowd: int) -> None:
    """However long another tenant's line is, a newcomer waits at most as if that tenant had as much waiting as its own."""
    lines = tuple(line for line in queue.lines if line.tenant != 99)
    own_tokens = newcomer.tokens + sum(line.tokens for line in lines if (line.tenant, line.rank) == (newcomer.tenant, rank))
    own_sequences = newcomer.sequences + sum(line.sequences for line in lines if (line.tenant, line.rank) == (newcomer.tenant, rank))

    def wait(tokens: int, sequences: int) -> float:
        crowded = msgspec.structs.replace(queue, lines=(*lines, Line(99, rank, 1, sequences, tokens)))
        return predicted_wait(crowded, newcomer, rank)

    assert wait(own_tokens * crowd, own_sequences * crowd) == pytest.approx(wait(own_tokens, own_sequences))


@given(_QUEUES, _NEWCOMERS)
def test_whoever_comes_in_meets_the_bounds(queue: Queue, newcomer: Newcomer) -> None:
    found = place(queue, BOUNDS, newcomer)
    if isinstance(found, Place):
        assert not queue.lines or found.wait <= BOUNDS.wait
        assert found.rank // 2 == PRIORITIES.index(newcomer.priority)
        if found.rank % 2 == PATIENT:
            assert newcomer.priority != "sheddable" or not queue.flooded
            assert found.wait > queue.limit > 0
    else:
        assert isinstance(found, DeadlineUnmeetable | WaitTooLong)
        assert found.retry_after is None or found.retry_after >= 1


@given(_LINES, _NEWCOMERS)
def test_room_is_made_by_the_least_important_and_then_by_the_largest_crowd(lines: tuple[Line, ...], newcomer: Newcomer) -> None:
    own = PRIORITIES.index(newcomer.priority)
    giver = who_gives_way(lines, newcomer)
    lowest = min((line.rank // 2 for line in lines), default=None)
    if giver is None:
        assert lowest is None or lowest >= own
        return
    assert giver.rank // 2 <= own
    if lowest is not None and lowest < own:
        assert giver.rank // 2 == lowest
    waiting = {line.tenant: 0 for line in lines}
    for line in lines:
        if line.rank // 2 == giver.rank // 2:
            waiting[line.tenant] += line.requests
    if giver.rank // 2 == own:
        assert waiting[giver.tenant] > waiting.get(newcomer.tenant, 0) + 1
        assert waiting[giver.tenant] == max(waiting.values())


@given(_QUEUES, st.integers(0, 300))
def test_more_before_one_never_frees_a_slot_sooner(queue: Queue, sequences: int) -> None:
    queue = msgspec.structs.replace(queue, running=len(queue.frees))
    assert slot_wait(queue, sequences) <= slot_wait(queue, sequences + 1) + 1e-9


def test_ranks_are_by_priority_and_then_by_patience() -> None:
    ranks = [rank_of(priority, kind) for priority in PRIORITIES for kind in (PATIENT, PROMPT)]
    assert ranks == sorted(ranks) == [0, 1, 2, 3, 4, 5]


def test_the_first_in_the_queue_is_never_too_large_for_it() -> None:
    assert not is_full(Queue(), Bounds(1, 10, 60.0), Newcomer(tenant=1, tokens=1_000_000))


def test_who_fills_their_share_is_told_so_and_others_that_the_queue_is_full() -> None:
    queue = Queue(lines=(Line(1, 3, 6, 6, 60), Line(2, 3, 4, 4, 40)))
    assert isinstance(no_room(queue, Bounds(10, 1000, 60.0), Newcomer(tenant=1, tokens=10)), QueueShareFull)
    assert isinstance(no_room(Queue(lines=(Line(1, 3, 6, 6, 60),)), Bounds(6, 1000, 60.0), Newcomer(tenant=1, tokens=10)), QueueFull)


# In virtual time


def _peak(**engine: object) -> tuple[float, float]:
    best = (0.0, 0.0)
    for rate in (13, 14, 15, 16):
        outcomes = OverloadedEngine(**engine).run(steady(rate, 0, 20), 30)  # type: ignore[arg-type]
        best = max(best, (goodput(outcomes, 0, 20), float(rate)))
    return best


def test_ten_times_too_much_load_costs_no_goodput_and_ends_at_once() -> None:
    peak, rate = _peak()
    engine = OverloadedEngine()
    outcomes = engine.run(steady(2, 0, 2) + steady(10 * rate, 2, 17) + steady(rate, 17, 27), 33)
    assert goodput(outcomes, 2, 17) >= 0.95 * peak
    assert goodput(outcomes, 22, 27) >= 0.9 * peak
    late = [outcome for outcome in outcomes if outcome.refused is not None and outcome.refused_at > outcome.arrived]
    assert not late, "who is refused is refused at once"


def test_a_machine_that_stutters_keeps_most_of_its_goodput() -> None:
    def stutters(now: float) -> float:
        return 2.5 if int(now) % 4 == 3 else 1.0

    peak, rate = _peak(slowness=stutters)
    outcomes = OverloadedEngine(slowness=stutters).run(steady(2, 0, 2) + steady(10 * rate, 2, 14), 20)
    assert goodput(outcomes, 2, 14) >= 0.75 * peak


@pytest.mark.parametrize("count", [64, BURST])
def test_a_burst_is_served_whole_and_in_order(count: int) -> None:
    outcomes = OverloadedEngine().run([(0.0, {"tenant": 1})] * count, 60)
    assert all(outcome.refused is None and outcome.tokens == 32 for outcome in outcomes)
    firsts = [outcome.first or 0.0 for outcome in outcomes]
    assert firsts == sorted(firsts)


def test_a_quiet_tenant_isnt_refused_for_anothers_flood() -> None:
    flood = steady(150, 0, 10, tenant=1)
    quiet = steady(1, 2, 10, tenant=2)
    outcomes = OverloadedEngine().run(flood + quiet, 30)
    assert any(outcome.refused is not None for outcome in outcomes if outcome.tenant == 1)
    assert all(outcome.refused is None for outcome in outcomes if outcome.tenant == 2)


def test_a_full_queue_makes_room_for_the_important_and_for_the_small_tenant() -> None:
    engine = OverloadedEngine(OverloadSection(max_queue_requests=8, ttft_target=0))
    for _ in range(6):
        engine.arrive(1, "sheddable")
    mine = [engine.arrive(1) for _ in range(2)]
    important = engine.arrive(2, "critical")
    shed = [outcome for outcome in engine.outcomes if isinstance(outcome.refused, Shed)]
    assert important.refused is None
    assert [outcome.priority for outcome in shed] == ["sheddable"]
    assert shed == [engine.outcomes[5]], "the latest goes"
    mine += [engine.arrive(1) for _ in range(5)]
    assert isinstance(engine.arrive(1, "sheddable").refused, QueueFull | QueueShareFull)
    other = engine.arrive(3)
    assert other.refused is None
    assert isinstance(mine[-1].refused, Shed)
    told = engine.arrive(1).refused
    assert isinstance(told, QueueShareFull)
    assert told.status == 429
    assert told.retry_after is not None


def test_the_sheddable_are_refused_where_others_may_wait() -> None:
    engine = OverloadedEngine()
    assert engine.arrive(1, "sheddable").refused is None
    engine.run(steady(150, 0, 2), 2)
    assert engine.admission.queue().flooded
    assert isinstance(engine.arrive(2, "sheddable").refused, WaitTooLong)
    assert engine.arrive(3).refused is None


def test_a_deadline_that_cant_be_met_is_refused_and_a_retry_after_that_time_is_not() -> None:
    engine = OverloadedEngine(OverloadSection(ttft_target=0))
    engine.run([(0.0, {"tenant": 1})] * 60, 1.0)
    refusal: HeadraceError | None = engine.arrive(1, timeout=0.7, most=1).refused
    assert isinstance(refusal, DeadlineUnmeetable)
    assert refusal.retry_after is not None
    engine.run([], engine.now + refusal.retry_after)
    assert engine.arrive(1, timeout=0.7, most=1).refused is None


def test_what_would_take_too_long_on_an_idle_engine_is_told_that_more_time_helps() -> None:
    engine = OverloadedEngine()
    engine.run([(0.0, {})], 3.0)
    refusal = engine.arrive(most=1000, timeout=1.0).refused
    assert isinstance(refusal, DeadlineUnmeetable)
    assert "without any other request, too" in refusal.message
    assert refusal.retry_after == 1


def test_the_first_request_of_all_is_measured_by_the_warm_up() -> None:
    engine = OverloadedEngine()
    assert engine.arrive(timeout=0.005).refused is None, "nothing is known"
    engine = OverloadedEngine()
    engine.admission.pace = known_pace()
    assert isinstance(engine.arrive(timeout=0.005).refused, DeadlineUnmeetable)
    assert engine.arrive(timeout=5.0).refused is None


@pytest.mark.parametrize("timeout", [1.0, 3.0])
def test_no_more_are_let_in_than_can_end_in_time(timeout: float) -> None:
    """A burst of requests that say how long they may take: who is let in has its answer, the others know at once, and when to come."""
    engine = OverloadedEngine()
    engine.admission.pace = known_pace()
    engine.run([(0.0, {"timeout": timeout, "most": 60, "may_end": True})] * 200, 2 * timeout)
    let_in = [outcome for outcome in engine.outcomes if outcome.refused is None]
    assert 4 * timeout <= len(let_in) < 200
    late = [outcome for outcome in let_in if outcome.last is None or outcome.last - outcome.arrived > 1.1 * timeout]
    assert late == []
    refused = [outcome.refused for outcome in engine.outcomes if outcome.refused is not None]
    assert all(isinstance(each, DeadlineUnmeetable) and each.retry_after is not None for each in refused)


def test_what_would_begin_in_time_and_end_too_late_is_refused_where_only_the_pace_of_tokens_is_known() -> None:
    queue = Queue(slots=4, running=4, frees=(8.0,) * 4, token_seconds=0.05, length=80)
    assert isinstance(place(queue, BOUNDS, Newcomer(0, timeout=9, most=80)), DeadlineUnmeetable)
    assert isinstance(place(queue, BOUNDS, Newcomer(0, timeout=13, most=80)), Place)
    assert isinstance(place(queue, BOUNDS, Newcomer(0, timeout=9, most=10)), Place)


def test_a_request_that_may_be_too_long_by_itself_is_let_in_unless_others_make_it_twice_as_long() -> None:
    engine = OverloadedEngine()
    engine.admission.pace = known_pace()
    engine.run([(0.0, {})], 3.0)
    assert engine.arrive(most=1000, timeout=0.3, may_end=True).refused is None
    engine.run([(engine.now, {"most": 400})] * 40, engine.now + 3.0)
    assert len(engine.running) == 41
    assert isinstance(engine.arrive(most=1000, timeout=0.3, may_end=True).refused, DeadlineUnmeetable)


def test_short_answers_to_short_requests_say_nothing_of_long_ones_and_cut_ones_even_less() -> None:
    engine = OverloadedEngine()
    admission = engine.admission
    engine.run([(0.0, {"most": 5})] * 8, 2.0)
    queue = admission.queue()
    assert queue.length == pytest.approx(5)
    assert queue.share == pytest.approx(1)
    engine.arrive(most=1000)
    engine.run([], engine.now + 1.0)
    (job,) = engine.running
    engine.running.remove(job)
    assert job.done > 5
    admission.ended(job.entry, cut=True)
    assert admission.queue().length > 5
    engine.arrive(most=1000)
    engine.run([], engine.now + 0.08)
    (job,) = engine.running
    known = admission.queue().length
    assert job.done < known
    admission.ended(job.entry, cut=True)
    assert admission.queue().length == known
    assert admission.queue().share == pytest.approx(1)


def test_a_bad_hour_is_forgotten() -> None:
    """Speeds measured on a machine that was busy with something else refuse nobody for good."""
    engine = OverloadedEngine(slowness=lambda now: 300.0 if now < 60 else 1.0)
    engine.admission.pace = known_pace()
    engine.run([(0.0, {"prompt": prompt, "most": 1}) for prompt in (50, 100, 200)], 60)
    assert isinstance(engine.arrive(prompt=200, timeout=2.0, most=1).refused, DeadlineUnmeetable)
    engine.run([], engine.now + 600)
    assert engine.arrive(prompt=200, timeout=2.0, most=1).refused is None


def test_a_warm_up_in_a_bad_hour_is_forgotten_too() -> None:
    engine = OverloadedEngine()
    engine.admission.pace = known_pace(slowness=100)
    assert isinstance(engine.arrive(timeout=1.0, most=1).refused, DeadlineUnmeetable)
    engine.run([], 100)
    assert engine.arrive(timeout=1.0, most=1).refused is None


def known_pace(slowness: float = 1) -> Pace:
    pace = Pace()
    for tokens in (1, 16, 160):
        pace.note(tokens, slowness * (FIXED + PER_TOKEN * tokens))
    return pace


def test_those_who_have_gone_wait_for_no_room() -> None:
    engine = OverloadedEngine()
    engine.run(steady(150, 0, 1.2), 1.2)
    assert len(engine.held) > 1
    for entry in [entry for entry in engine.admission._waiting.values() if entry.held]:
        entry.evict()
    assert engine.admission.waits
    engine.admission._flooded = True  # nobody is let go while the engine has anything waiting
    engine.held.release()
    assert not len(engine.held)


def test_who_waits_too_long_is_put_out_with_the_reason() -> None:
    engine = OverloadedEngine()
    engine.run(steady(150, 0, 1.2), 1.2)
    held = [entry for entry in engine.admission._waiting.values() if entry.held]
    assert held
    engine.admission.outwaited(held[0])
    assert isinstance(held[0].shed, Shed)
    limited = engine.arrive(7, prompt=5000, timeout=30.0)
    entry = next(entry for entry in engine.admission._waiting.values() if entry.request.tenant == 7)
    engine.admission.outwaited(entry)
    assert isinstance(limited.refused, DeadlineExceeded)
    assert "queue" in limited.refused.message
