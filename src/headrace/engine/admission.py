"""Who may come into an engine's queue: keeps count of what waits and runs, measures how fast it goes, and decides by `headrace.waiting`.

It stands in the worker, before the engine, because the worker alone sees the requests of all API processes; the requests themselves wait in
the engine's scheduler, which takes them by rank and shares between tenants.

Requests beyond the limit are patient: they are held back before the engine (`engine/held.py`), which gets them in order as it has room.
Only when one tenant has `BURST` of them is the model flooded: from then on, and until half of them are gone, what comes newly goes before
them. So a burst is served in the order in which it came, and an overload doesn't make everybody late.

The limit within which a request counts as prompt is not set by hand. It is that part of the target for the time to first token that, going
by how long prompt requests of late really waited against what had been predicted for them, leads to `AIM` of the target: where predictions
are too low, because decodes or others on the machine slow the prompts down, the limit falls in proportion, and rises again with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import msgspec

from headrace.config import OverloadSection
from headrace.engine.pace import Pace
from headrace.errors import DeadlineExceeded, HeadraceError, Shed
from headrace.types import PATIENT, PROMPT, EngineStats, GenerateRequest
from headrace.waiting import BURST, Bounds, Line, Newcomer, Place, Queue, is_full, no_room, place, predicted_wait, rank_of, who_gives_way

MEMORY = 3.0
"""Seconds of waiting requests over which the speed of prompts is measured."""
AIM = 0.55
"""Of the target: where the wait of the last that is let in as prompt should come out. The rest is for what can't be foreseen."""
LEAST_SHARE, MOST_SHARE = 0.2, 0.7
"""Of the target: bounds of the limit."""
PRIOR = 0.5
"""Seconds of a wait that came out as predicted, to begin with and to fall back on."""
FORGET = 5.0
"""Seconds in which the comparison of waits with their predictions loses most of its weight."""
KEPT = 8
"""Requests, and tenants, that the engine has waiting at least, while others are held back before it."""
FIRST_LENGTH = 128.0
"""Tokens that a completion is expected to have before any has ended. What it may have is no measure: a request that names no limit may fill
the whole context, and nobody should be refused for that."""
FRESH = 10.0
"""Seconds of an idle engine in which half of what is known of its speed is forgotten. What was measured while something else kept the
machine busy would have everybody refused, and then nobody comes to prove it wrong."""
LEAST_KNOWN = 0.05
"""What is never forgotten of it."""
_LATEST = 0.1
"""Weight of the latest request in the averages of length and pace."""


class Entry:
    """A request in the engine."""

    __slots__ = (
        "before",
        "began_to_wait",
        "certain",
        "evict",
        "first_at",
        "generated",
        "line",
        "most",
        "received_at",
        "request",
        "sequences",
        "shed",
        "tokens",
        "wait",
    )

    def __init__(self, request: GenerateRequest, rank: int, received_at: float, evict: Callable[[], None]) -> None:
        sampling = request.sampling
        self.request = request
        self.line = request.tenant, rank
        self.received_at = received_at
        self.evict = evict
        """Ends it in the engine."""
        self.tokens = len(request.prompt)
        self.sequences = sampling.n
        self.most = sampling.max_tokens
        self.certain = sampling.max_tokens if sampling.ignore_eos else min(sampling.min_tokens, sampling.max_tokens)
        self.generated = 0
        """Tokens, over all choices."""
        self.first_at: float | None = None
        self.before: int | None = None
        """Prompt tokens that waited in the engine when it came there; None if there was no slot for it."""
        self.began_to_wait = received_at
        """When it was handed to the engine."""
        self.wait = 0.0
        """Seconds to its first token that were predicted."""
        self.shed: HeadraceError | None = None
        """Why it was put out of the queue, if so."""

    @property
    def held(self) -> bool:
        """Whether it is held back before the engine."""
        return self.line[1] % 2 == PATIENT


@runtime_checkable
class TellsPace(Protocol):
    """An engine that knows how long its steps take, from its warm-up on."""

    pace: Pace


class Admission:
    """Counts requests from receipt to end. `slots`: most sequences that the engine runs at once, 0 where that isn't known."""

    def __init__(self, section: OverloadSection, *, slots: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds = Bounds(section.max_queue_requests, section.max_queue_tokens, section.max_queue_wait)
        self.refused = 0
        """Requests that were not let in, or put out."""
        self.pace = Pace()
        """The engine's, where it tells; what is known before any request has been."""
        self._target = section.ttft_target
        self._waited = self._foretold = 0.0
        """Seconds that prompt requests of late waited, and that had been predicted for them; both fade."""
        self._slots = slots
        self._clock = clock
        self._waiting: dict[int, Entry] = {}
        """By identity, in order of arrival."""
        self._running: dict[int, Entry] = {}
        self._lines: dict[tuple[int, int], list[int]] = {}
        """Requests, sequences and tokens that wait, by tenant and rank."""
        self._sequences_running = 0
        self._tokens_done = self._time_spent = 0.0
        self._first_tokens = Pace()
        """How the wait grows with the prompt tokens before the first token, of requests that found a slot."""
        self._active_at = clock()
        """When the engine last made something."""
        self._held = 0
        self._flooded = False
        self._looked_at = clock()
        self._length = 0.0
        """Mean of the completions' lengths, tokens; 0 before the first."""
        self._share = 0.0
        """Mean of what completions have of what they may have."""
        self._gap = 0.0

    @property
    def waits(self) -> bool:
        """Whether any request waits for its first token."""
        return bool(self._waiting)

    def admit(self, request: GenerateRequest, evict: Callable[[], None], *, known: bool = False) -> Entry:
        """Let a request in, for which others may have to go. Raises `NotAdmitted` and `QueueShareFull`.

        One that is `known`, or that goes on after an engine's death, was let in before and is not asked again.
        """
        now = self._clock()
        self._look(now)
        entry = Entry(request, request.rank, now, evict)
        if request.resume is None and not known:
            newcomer = Newcomer.of(request)
            queue = self.queue()
            found = place(queue, self.bounds, newcomer)
            if isinstance(found, Place) and is_full(queue, self.bounds, newcomer):
                found = self._make_room(newcomer, found)
            if not isinstance(found, Place):
                self.refused += 1
                raise found
            entry.line = request.tenant, found.rank
            entry.wait = found.wait
        self._enter(entry)
        return entry

    def has_room(self, entry: Entry) -> bool:
        """Whether this one, the next of those that are held back, should go to the engine now: always when that has nothing waiting, or
        only that of fewer than `KEPT` other tenants (the engine's next turn is then its tenant's); unless it is flooded, also while it has
        little, or while this one's tenant has so little there that it would begin within the limit."""
        tenant, rank = entry.line
        there = {other for other, other_rank in self._lines if other_rank % 2 == PROMPT}
        if tenant not in there and len(there) < KEPT:
            return True
        if self._flooded:
            return False
        prompt = Newcomer(tenant=tenant, tokens=entry.tokens, sequences=entry.sequences)
        return len(self._waiting) - self._held < KEPT or predicted_wait(self.queue(), prompt, rank - PATIENT + PROMPT) <= self._limit()

    def released(self, entry: Entry) -> None:
        """One that was held back goes to the engine."""
        now = self._clock()
        self._look(now)
        self._leave_line(entry)
        tenant, rank = entry.line
        entry.line = tenant, rank - PATIENT + PROMPT
        entry.began_to_wait = now
        entry.wait = predicted_wait(self.queue(), Newcomer.of(entry.request), entry.line[1])
        self._enter(entry)

    def progressed(self, entry: Entry, tokens: int) -> None:
        """More of its tokens came out of the engine; the first ends its wait."""
        entry.generated += tokens
        if entry.first_at is None and tokens and id(entry) in self._waiting:
            now = self._clock()
            self._look(now)
            self._leave_line(entry)
            entry.first_at = now
            self._running[id(entry)] = entry
            self._sequences_running += entry.sequences
            if entry.request.resume is None:
                self._tokens_done += entry.tokens
                if entry.before is not None:
                    self._first_tokens.note(entry.before + entry.tokens, now - entry.began_to_wait)
                if entry.line[1] % 2 == PROMPT:
                    self._waited += now - entry.began_to_wait
                    self._foretold += entry.wait

    def ended(self, entry: Entry, *, cut: bool = False) -> None:
        """Nothing more comes of it; `cut` if it didn't end by itself. Idempotent."""
        now = self._clock()
        self._look(now)
        if id(entry) in self._waiting:
            self._leave_line(entry)
        elif self._running.pop(id(entry), None) is not None:
            self._active_at = now
            self._sequences_running -= entry.sequences
            assert entry.first_at is not None
            length = entry.generated / entry.sequences
            if not cut:
                share = length / max(1, entry.most)
                self._share = _averaged(self._share, share)
            if not cut or length > self._length:
                # What was cut would have been longer.
                self._length = _averaged(self._length, length)
            if length > 1:
                gap = (now - entry.first_at) / (length - 1)
                self._gap = _averaged(self._gap, gap)

    def put_out(self, entry: Entry, why: HeadraceError) -> bool:
        """End a request that waits; False if it doesn't wait any more."""
        if id(entry) not in self._waiting:
            return False
        self.refused += 1
        self._leave_line(entry)
        entry.shed = why
        entry.evict()
        return True

    def outwaited(self, entry: Entry) -> None:
        """It has waited for as long as it may."""
        timeout = entry.request.timeout
        if timeout is not None and timeout <= self.bounds.wait:
            why = f"The request ran into its time limit of {timeout:g} s while it was waiting in the queue: {timeout:.2f} s in the queue."
            self.put_out(entry, DeadlineExceeded(why))
            return
        self.put_out(
            entry, Shed(f"It waited for {self.bounds.wait:g} s for its first token, the longest that is allowed.", retry_after=1.0)
        )

    def queue(self) -> Queue:
        """A snapshot."""
        gap, known = self._pace(), self._known()
        running = sorted([self._left(entry) * gap for entry in self._running.values() for _ in range(entry.sequences)])
        mean = self._length or min(
            FIRST_LENGTH, sum([entry.most for entry in self._running.values()]) / len(self._running) if self._running else FIRST_LENGTH
        )
        return Queue(
            lines=tuple([Line(tenant, rank, *counts) for (tenant, rank), counts in self._lines.items()]),
            slots=self._slots,
            running=self._sequences_running,
            frees=tuple(running),
            seconds_each=mean * gap,
            flooded=self._flooded,
            speed=self._speed(),
            own=(self._first_tokens.per_token or self.pace.per_token) * known,
            token_seconds=gap * known,
            limit=self._limit(),
            step_fixed=self.pace.fixed * known,
            step_each=self.pace.per_token * known,
            length=self._length or FIRST_LENGTH,
            share=self._share,
        )

    def wait(self) -> float:
        """Seconds to the first token of a short `default` request of a new tenant, if it came in now."""
        return predicted_wait(self.queue(), Newcomer(tenant=0, tokens=1), rank_of("default", PROMPT))

    def stats(self, stats: EngineStats) -> EngineStats:
        """The engine's, with what is known here."""
        held = sum([counts[1] for (_, rank), counts in self._lines.items() if rank % 2 == PATIENT])
        return msgspec.structs.replace(stats, waiting=stats.waiting + held, predicted_wait=self.wait(), refused=self.refused)

    # --- the queue ---

    def _enter(self, entry: Entry) -> None:
        waiting = [counts for (_, rank), counts in self._lines.items() if rank % 2 == PROMPT]
        free = not self._slots or self._sequences_running + sum([counts[1] for counts in waiting]) + entry.sequences <= self._slots
        entry.before = sum([counts[2] for counts in waiting]) if free and not entry.held else None
        self._waiting[id(entry)] = entry
        line = self._lines.setdefault(entry.line, [0, 0, 0])
        line[0] += 1
        line[1] += entry.sequences
        line[2] += entry.tokens
        if entry.held:
            self._held += 1
            self._flooded = self._flooded or line[0] >= BURST

    def _leave_line(self, entry: Entry) -> None:
        del self._waiting[id(entry)]
        line = self._lines[entry.line]
        line[0] -= 1
        line[1] -= entry.sequences
        line[2] -= entry.tokens
        if not line[0]:
            del self._lines[entry.line]
        if entry.held:
            self._held -= 1
            self._flooded = self._flooded and any(
                counts[0] > BURST // 2 for (_, rank), counts in self._lines.items() if rank % 2 == PATIENT
            )

    def _make_room(self, newcomer: Newcomer, found: Place) -> Place | HeadraceError:
        """Put out as many as it takes, or nobody if that isn't enough."""
        lines = dict(self._lines)
        queue = self.queue()
        going: list[Entry] = []
        gone: set[int] = set()
        while is_full(queue, self.bounds, newcomer):
            line = who_gives_way(queue.lines, newcomer)
            victim = None if line is None else self._latest(line, gone)
            if victim is None:
                return no_room(self.queue(), self.bounds, newcomer)
            going.append(victim)
            gone.add(id(victim))
            requests, sequences, tokens = lines[victim.line]
            lines[victim.line] = [requests - 1, sequences - victim.sequences, tokens - victim.tokens]
            queue = Queue(lines=tuple([Line(tenant, rank, *counts) for (tenant, rank), counts in lines.items() if counts[0]]))
        for victim in going:
            wait = predicted_wait(self.queue(), Newcomer.of(victim.request), victim.line[1])
            whose = "more important requests" if victim.line[1] < found.rank - 1 else "a tenant with fewer requests"
            self.put_out(victim, Shed(f"The model's queue is full, and this request made room for {whose}.", retry_after=max(1.0, wait)))
        return found

    def _latest(self, line: Line, gone: set[int]) -> Entry | None:
        key = line.tenant, line.rank
        return next((entry for entry in reversed(self._waiting.values()) if entry.line == key and id(entry) not in gone), None)

    # --- how fast it goes ---

    def _look(self, now: float) -> None:
        """Count the time since the last look, if prompts were what was waited for: while no slot is free it says nothing of their speed."""
        spent = now - self._looked_at
        self._looked_at = now
        faded = FORGET / (FORGET + max(0.0, spent))
        self._waited *= faded
        self._foretold *= faded
        if spent <= 0 or len(self._waiting) == self._held or (self._slots and self._sequences_running >= self._slots):
            return
        kept = MEMORY / (MEMORY + spent)
        self._tokens_done *= kept
        self._time_spent = (self._time_spent + spent) * kept

    def _speed(self) -> float:
        if self._time_spent > 1e-3 and self._tokens_done:
            return self._tokens_done / self._time_spent
        return 1 / self.pace.per_token if self.pace.per_token else 0.0

    def _known(self) -> float:
        """How much of what is known of the engine's speed still counts."""
        if self._running or len(self._waiting) > self._held:
            return 1.0
        return max(LEAST_KNOWN, FRESH / (FRESH + max(0.0, self._clock() - self._active_at)))

    def _pace(self) -> float:
        """Seconds between two tokens of a sequence: of those that ended, or of those that run where they are slower than that."""
        now = self._clock()
        paces = [
            (now - entry.first_at) / max(1.0, entry.generated / entry.sequences - 1) for entry in self._running.values() if entry.first_at
        ]
        return max(self._gap, sum(paces) / len(paces)) if paces and not self._gap else self._gap

    def _left(self, entry: Entry) -> float:
        """Tokens that each of its sequences is expected to make yet: as requests make on average, or what it may if that is less."""
        done = entry.generated / entry.sequences
        most = max(1.0, entry.most - done)
        if entry.certain >= entry.most:
            return most
        length = self._length or FIRST_LENGTH
        expected = max(length, float(entry.certain)) - done
        return min(most, expected if expected > 0 else length)

    def _limit(self) -> float:
        """Seconds that may be predicted for a request which counts as prompt; 0 where there is no target."""
        share = AIM * (self._foretold + PRIOR) / (self._waited + PRIOR)
        return self._target * min(MOST_SHARE, max(LEAST_SHARE, share))


def _averaged(mean: float, latest: float) -> float:
    """The average with one more in it; 0 is one of nothing."""
    return mean + _LATEST * (latest - mean) if mean else latest
