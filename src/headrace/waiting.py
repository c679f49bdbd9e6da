"""How long a request would wait for a model, and whether it may: the arithmetic of admission, over a snapshot of the queue.

The engine's worker decides by it (`engine/admission.py`): it alone sees the requests of all API processes. Each API process decides by it
beforehand, over the last snapshot that the worker sent, so that what would be refused costs next to nothing (`policies/admit.py`).

The wait is that until the first token. It has two causes, and the longer counts: the prompts that are computed before (at the speed
measured of late, beside the decodes there were), and a slot in the batch (when those that run are expected to end). Who goes before whom
is as in the scheduler: the higher rank first; within a rank the tenants take turns, so that before a request come those of its own tenant
and of each other one no more than its tenant has. docs/overload.md tells it to operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from headrace.errors import DeadlineUnmeetable, HeadraceError, QueueFull, QueueShareFull, WaitTooLong
from headrace.types import PATIENT, PRIORITIES, PROMPT, GenerateRequest, Priority

BURST = 128
"""Requests of a tenant that may wait for longer than the target, behind all that needn't: two full `/chat/batch`es, say."""

CROWDING = 2.0
"""How many times as long as by itself a request may be made to take by others, if it is too long for its deadline anyway."""
SLACK = 1.1
"""A request is refused for its deadline where it is predicted to take so many times that: a prediction is no promise."""


class Bounds(msgspec.Struct, frozen=True, array_like=True):
    """What an operator allows the queue of a model to be."""

    requests: int
    tokens: int
    """Of prompts."""
    wait: float
    """Seconds."""


class Line(msgspec.Struct, frozen=True, array_like=True):
    """What one tenant has waiting at one rank: requests without a first token."""

    tenant: int
    rank: int
    requests: int
    sequences: int
    tokens: int
    """Of their prompts."""


class Queue(msgspec.Struct, frozen=True, array_like=True):
    """A snapshot of a model's queue and of the engine behind it."""

    lines: tuple[Line, ...] = ()
    slots: int = 0
    """Most sequences that run at once; 0 where there is no limit, or none that is known."""
    running: int = 0
    """Sequences of requests that have had their first token."""
    frees: tuple[float, ...] = ()
    """Seconds until each running sequence is expected to end, soonest first."""
    seconds_each: float = 0.0
    """That a sequence is expected to run from its first token to its last."""
    speed: float = 0.0
    """Prompt tokens of waiting requests that get done in a second, beside the decodes; 0 where it is not known yet."""
    own: float = 0.0
    """Seconds that a token of a request's own prompt adds to its wait, where that is known: short prompts say nothing of long ones."""
    token_seconds: float = 0.0
    """Seconds from one token of a sequence to its next."""
    flooded: bool = False
    """So many patient requests wait that they are left for later, and what comes newly goes before them."""
    limit: float = 0.0
    """Seconds that a request may wait without being patient: less than the target, and corrected by what is observed; 0 is no limit."""
    step_fixed: float = 0.0
    """Seconds that a step takes, whatever is in it; 0 where that isn't known."""
    step_each: float = 0.0
    """Seconds that each sequence adds to a step."""
    length: float = 0.0
    """Tokens that a completion is expected to have; 0 where nothing is expected."""
    share: float = 0.0
    """Of the tokens that a completion may have, those that it is expected to."""

    @property
    def requests(self) -> int:
        return sum([line.requests for line in self.lines])

    @property
    def tokens(self) -> int:
        return sum([line.tokens for line in self.lines])


class Newcomer(msgspec.Struct, frozen=True):
    """A request that asks to be let in."""

    tenant: int
    priority: Priority = "default"
    tokens: int = 0
    """Of its prompt."""
    sequences: int = 1
    certain: int = 0
    """Tokens of completion that it will certainly make after its first."""
    timeout: float | None = None
    most: int = 0
    """Tokens of completion that it may make; 0 where that isn't known."""

    @classmethod
    def of(cls, request: GenerateRequest) -> Newcomer:
        sampling = request.sampling
        certain = sampling.max_tokens if sampling.ignore_eos else min(sampling.min_tokens, sampling.max_tokens)
        timeout = request.wanted_within if request.timeout is None else request.timeout
        return cls(request.tenant, request.priority, len(request.prompt), sampling.n, max(0, certain - 1), timeout, sampling.max_tokens)


class Place(msgspec.Struct, frozen=True):
    """Where a request that may come in stands."""

    rank: int
    wait: float
    """Seconds to its first token, as predicted."""


def rank_of(priority: Priority, kind: int) -> int:
    """The order in which the scheduler takes what waits, highest first: by priority, and within one the `PROMPT` before the `PATIENT`."""
    return 2 * PRIORITIES.index(priority) + kind


def predicted_wait(queue: Queue, newcomer: Newcomer, rank: int) -> float:
    """Seconds until the request's first token if it came in now at that rank; 0 while nothing is known of the engine's speed."""
    tokens, sequences = _until(queue, newcomer, rank)
    before = (tokens - newcomer.tokens) / queue.speed if queue.speed else 0.0
    return max(before, slot_wait(queue, sequences)) + newcomer.tokens * queue.own + queue.step_fixed


def _until(queue: Queue, newcomer: Newcomer, rank: int) -> tuple[int, int]:
    """Prompt tokens and sequences that wait and go before the request, and its own."""
    own_tokens, own_sequences = newcomer.tokens, newcomer.sequences
    tokens = sequences = 0
    for line in queue.lines:
        if line.rank == rank and line.tenant == newcomer.tenant:
            own_tokens += line.tokens
            own_sequences += line.sequences
        elif line.rank > rank:
            tokens += line.tokens
            sequences += line.sequences
    for line in queue.lines:
        if line.rank == rank and line.tenant != newcomer.tenant:
            tokens += min(line.tokens, own_tokens)
            sequences += min(line.sequences, own_sequences)
    return tokens + own_tokens, sequences + own_sequences


def slot_wait(queue: Queue, sequences: int) -> float:
    """Seconds until so many more sequences have had their slot in the batch."""
    excess = queue.running + sequences - queue.slots
    if not queue.slots or excess <= 0:
        return 0.0
    if excess <= len(queue.frees):
        return queue.frees[excess - 1]
    last = queue.frees[-1] if queue.frees else 0.0
    return last + (excess - len(queue.frees)) * queue.seconds_each / queue.slots


def place(queue: Queue, bounds: Bounds, newcomer: Newcomer) -> Place | HeadraceError:
    """Where a request would stand, or why it may not come in. It knows nothing of the bounds on requests and tokens: `room` does."""
    rank = rank_of(newcomer.priority, PROMPT)
    last = predicted_wait(queue, newcomer, rank_of(newcomer.priority, PATIENT))
    wait = predicted_wait(queue, newcomer, rank) if queue.flooded else last
    patient = bool(queue.limit) and wait > queue.limit
    if patient:
        rank, wait = rank_of(newcomer.priority, PATIENT), last
    late = refuse_late(queue, newcomer, wait) or crowded_out(queue, newcomer, rank, wait)
    if late is not None:
        return late
    if patient:
        burst = sum([line.requests for line in queue.lines if line.rank == rank and line.tenant == newcomer.tenant])
        if burst >= BURST or (queue.flooded and newcomer.priority == "sheddable"):
            return WaitTooLong(
                f"The first token would come after about {wait:.1f} s, and this model's queue aims at less; other requests go first.",
                retry_after=max(1.0, wait),
            )
    if wait > bounds.wait and queue.lines:
        return WaitTooLong(
            f"The first token would come after about {wait:.0f} s; {bounds.wait:g} s is the most (max_queue_wait).",
            retry_after=max(1.0, wait),
        )
    return Place(rank, wait)


# A request is told to come back when all that wait now are predicted to have begun. There will be room earlier, but predictions err.


def refuse_late(queue: Queue, newcomer: Newcomer, wait: float) -> HeadraceError | None:
    """Why the request can't be met in its time, if so. What it may generate doesn't count, only what it certainly will."""
    if newcomer.timeout is None:
        return None
    work = newcomer.certain * queue.token_seconds
    if wait + work <= SLACK * newcomer.timeout:
        return None
    alone = newcomer.tokens * queue.own + queue.step_fixed + newcomer.certain * _step(queue, newcomer.sequences)
    message = f"The request can't be met within its {newcomer.timeout:g} s: about {wait:.2f} s to its first token"
    message += f", and {work:.2f} s for the {newcomer.certain} tokens after it." if work else "."
    if alone > SLACK * newcomer.timeout:
        message += " It would take longer than that without any other request, too: give it more time."
    return DeadlineUnmeetable(message, retry_after=max(1.0, wait))


def crowded_out(queue: Queue, newcomer: Newcomer, rank: int, wait: float) -> HeadraceError | None:
    """Why the request is expected to run out of time in the present crowd, if so, and if without that crowd it is expected not to.

    A batch gives each of its sequences the fewer tokens a second the more there are; letting in more than can end in time would be
    the ruin of all of them. A request that is expected to take too long by itself is let in, as long as the crowd doesn't slow it down
    much: it may end sooner than others do.
    """
    expected = max(float(newcomer.certain), min(newcomer.most, max(queue.length, queue.share * newcomer.most)) - 1)
    if newcomer.timeout is None or not _step(queue, 1) or expected <= 0:
        return None
    crowd = queue.running + _until(queue, newcomer, rank)[1]
    if queue.slots:
        crowd = max(newcomer.sequences, min(crowd, queue.slots))
    room = newcomer.timeout - newcomer.tokens * queue.own - queue.step_fixed
    fits = room / _step(queue, newcomer.sequences)
    tokens, bearable = min(expected, max(1.0, fits)), newcomer.timeout * (1.0 if expected <= fits else CROWDING)
    if wait + tokens * _step(queue, crowd) <= bearable:
        return None
    work = expected * _step(queue, crowd)
    # So many of those that run have to end first.
    excess = crowd - int((bearable / tokens - queue.step_fixed) / queue.step_each) if queue.step_each else 0
    freed = queue.frees[min(excess, len(queue.frees)) - 1] if queue.frees and excess > 0 else 0.0
    message = f"The request is expected to take longer than its {newcomer.timeout:g} s: about {wait:.2f} s to its first token"
    message += f", and {work:.2f} s for the {expected:.0f} tokens that are usual after it, beside {crowd - newcomer.sequences} others."
    return DeadlineUnmeetable(message, retry_after=max(1.0, wait, freed))


def _step(queue: Queue, sequences: int) -> float:
    """Seconds of a step with so many sequences: as they are now where the engine doesn't tell, and 0 where nothing is known."""
    return queue.step_fixed + queue.step_each * sequences or queue.token_seconds


def is_full(queue: Queue, bounds: Bounds, newcomer: Newcomer) -> bool:
    """Whether it is beyond the bounds on requests and tokens. The first in the queue is never too large for it."""
    requests, tokens = queue.requests, queue.tokens
    return requests > 0 and (requests >= bounds.requests or tokens + newcomer.tokens > bounds.tokens)


def who_gives_way(lines: Sequence[Line], newcomer: Newcomer) -> Line | None:
    """The line whose latest request makes room for a newcomer where the queue is full; None where the newcomer itself is the one to go.

    The lowest priority goes first, and within one the tenant that has most waiting. Of its own priority a newcomer is given room only by
    tenants that have more waiting than its own will have then: no tenant is refused for another's crowd.
    """
    most: dict[tuple[int, int], int] = {}
    for line in lines:
        key = line.rank // 2, line.tenant
        most[key] = most.get(key, 0) + line.requests
    own = PRIORITIES.index(newcomer.priority)
    mine = most.get((own, newcomer.tenant), 0) + 1
    givers = [
        line for line in lines if line.requests and (line.rank // 2 < own or (line.rank // 2 == own and most[own, line.tenant] > mine))
    ]
    if not givers:
        return None
    return min(givers, key=lambda line: (line.rank // 2, -most[line.rank // 2, line.tenant], line.rank))


def no_room(queue: Queue, bounds: Bounds, newcomer: Newcomer) -> HeadraceError:
    """Why a newcomer finds no room: the tenant's own requests fill its share of the queue, or the queue is full of everybody's."""
    tenants = {line.tenant for line in queue.lines}
    mine = sum([line.requests for line in queue.lines if line.tenant == newcomer.tenant])
    # The first that waits gives up its place with its first token.
    wait = max(1.0, predicted_wait(queue, newcomer, rank_of(newcomer.priority, PROMPT)) / max(1, queue.requests))
    if len(tenants | {newcomer.tenant}) > 1 and mine * len(tenants) >= queue.requests:
        return QueueShareFull(f"{mine} of your requests wait for this model, which is your share of its queue.", retry_after=wait)
    return QueueFull(
        f"{queue.requests} requests with {queue.tokens} tokens wait for this model; {bounds.requests} and {bounds.tokens} are the most"
        " (max_queue_requests, max_queue_tokens).",
        retry_after=wait,
    )


def with_newcomer(queue: Queue, bounds: Bounds, newcomer: Newcomer) -> Queue:
    """The queue with a request in it that may come in."""
    found = place(queue, bounds, newcomer)
    if isinstance(found, HeadraceError):
        return queue
    lines = {(line.tenant, line.rank): line for line in queue.lines}
    before = lines.get((newcomer.tenant, found.rank)) or Line(newcomer.tenant, found.rank, 0, 0, 0)
    lines[newcomer.tenant, found.rank] = Line(
        newcomer.tenant, found.rank, before.requests + 1, before.sequences + newcomer.sequences, before.tokens + newcomer.tokens
    )
    return msgspec.structs.replace(queue, lines=tuple(lines.values()))


def foreseen(queue: Queue, bounds: Bounds, newcomer: Newcomer) -> HeadraceError | None:
    """Why the request would be refused, if so; not where others might be put out for it."""
    found = place(queue, bounds, newcomer)
    if isinstance(found, HeadraceError):
        return found
    if is_full(queue, bounds, newcomer) and who_gives_way(queue.lines, newcomer) is None:
        return no_room(queue, bounds, newcomer)
    return None
