"""What goes into the next step: who is admitted, who computes how much, and who has to give blocks back.

The rules, in the order in which a plan applies them:

1. Every sequence that decodes is in the step with one token. One that needs a block when there is none takes it from
   the latest-arrived sequence of the most-served tenant, which waits at the front of its tenant's queue, keeps its
   tokens, and is computed again later (its full blocks mostly come back from the prefix cache).
2. The rest of the step, up to `step_tokens` and to what the pace allows, goes to prompts in chunks: to the highest
   rank (`GenerateRequest.rank`) but for every eighth turn, within it to the tenant that was served least (of equals,
   to the one with less in the batch), and within a tenant by rank and in order of arrival. A waiting
   sequence is admitted when its turn comes and a slot and its blocks are there. A tenant with
   nothing in the batch need not wait for them: it takes them from tenants that have several sequences running.
3. A tenant whose only business is a first token doesn't wait behind a long batch of others' decodes: where those
   would make the step long they sit out one step, never two in a row. Its prompt isn't cut in two if it is short.
4. A waiting sequence whose next block is just being computed by another of the same tenant waits for that block
   instead of computing it again; others may pass it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass, field

from headrace.engine.blocks import BlockPool
from headrace.engine.pace import BRISK, EVEN, EXPRESS_PREFILL, LEAST_PREFILL, MEMORY, RELAXED, Haste, Pace
from headrace.engine.prefix import PrefixKeys
from headrace.engine.sequence import Job, Sequence, State
from headrace.engine.tenants import COMPLETION_WEIGHT, PROMPT_WEIGHT, Tenant, Tenants

SCORED_ROWS = 128
"""Most prompt positions scored in one step; bounds the memory for their logits."""
PIECE = 128
"""Prompt tokens computed at once where that must always be the same ones; at most `SCORED_ROWS`."""
FAIR_TURN = 8
"""Every so many turns go by what tenants were served alone, whatever the rank: no rank is starved by another tenant's higher one."""
EXPRESS_SHARE = 0.2
"""Others' decodes sit out a newcomer's step where they would take more than this share of a brisk step."""


@dataclass(slots=True)
class Chunk:
    """Tokens `begin` to `end` of a sequence's, to be computed in one step."""

    sequence: Sequence
    begin: int
    end: int
    rows: int
    """How many of its last positions need their distribution: to draw the next token, or to be scored."""
    last: bool
    """Whether it reaches the sequence's end, so that the next token is drawn."""
    scored: bool
    """Whether rows are to be scored."""


def unscored(sequence: Sequence) -> int:
    """The first prompt position whose successor must be scored yet; the sequence's length where none must."""
    job = sequence.job
    if not job.scored or len(job.scores) >= sequence.prompt_length:
        return sequence.length
    return len(job.scores) - 1


@dataclass(slots=True)
class Plan:
    """One step: `decodes` go on by one token each; `chunks` are prompt parts; `copies` (source, destination) come first."""

    decodes: list[Sequence]
    chunks: list[Chunk]
    copies: list[tuple[int, int]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)


class Scheduler:
    """Holds every sequence in the engine, and the blocks they use."""

    def __init__(
        self, pool: BlockPool, *, block_size: int, max_sequences: int, step_tokens: int, pace: Pace, deterministic: bool = False
    ) -> None:
        self.pool = pool
        self.deterministic = deterministic
        """Whether a token's keys and values may depend on nothing but the tokens before it: prompts are computed in fixed pieces, whatever
        the budget, and a completion token by token, also where it is computed again. The pool must not cache then."""
        self.block_size = block_size
        self.max_sequences = max_sequences
        self.step_tokens = step_tokens
        self.pace = pace
        self.tenants = Tenants()
        self.prefix_keys = PrefixKeys(block_size)
        self.decoding: list[Sequence] = []
        self.version = 0
        """Changes with the set of decoding sequences."""
        self.tables_version = 0
        """Changes with their blocks."""
        self.waiting = 0
        self.prefilling = 0
        self.preemptions = 0
        self._promised: dict[bytes, Sequence] = {}
        self._sources: list[int] = []
        self._express = False
        self._turn = 1
        self._closed = False
        self._last_tenant: int | None = None
        self._shared_until = float("-inf")

    @property
    def running(self) -> int:
        return len(self.decoding) + self.prefilling

    def add(self, job: Job) -> None:
        """Queue a new request."""
        root = self.prefix_keys.root(job.tenant)
        job.sequences += [Sequence(job, choice, root) for choice in job.choices]
        if job.tenant != self._last_tenant:
            if self._last_tenant is not None:
                self._shared_until = job.received_at + MEMORY
            self._last_tenant = job.tenant
        tenant = self.tenants.enter(job.tenant)
        for sequence in job.sequences:
            tenant.queue(sequence)
        self.waiting += len(job.sequences)

    # --- planning ---

    def plan(self, now: float) -> Plan:
        """The next step. Empty when there is nothing to do."""
        self._grow()
        if not self.waiting and not self.prefilling:
            self._express = False
            return Plan(self.decoding, [])
        newcomers = self._newcomers()
        express = newcomers if self._held_up() else []
        beside = 0 if express else len(self.decoding)
        least = max(LEAST_PREFILL, self._short_prompt(newcomers)) if beside else EXPRESS_PREFILL
        room = max(self.pace.room(self._haste(now), beside), least)
        plan = Plan([], [])
        self._fill(plan, min(room, self.step_tokens - beside), express or self.tenants.active())
        self._express = bool(express and plan.chunks)
        if not self._express:
            plan.decodes = self.decoding
        return plan

    def _haste(self, now: float) -> Haste:
        if now < self._shared_until or len(self.tenants) > 1:
            return BRISK
        return EVEN if 2 * (self.running + self.waiting) > self.max_sequences else RELAXED

    def _grow(self) -> None:
        """Make room for the next token of every sequence that decodes."""
        full = [sequence for sequence in self.decoding if sequence.computed == sequence.blocks.count * self.block_size]
        for sequence in full:
            while sequence.state == State.DECODE and not self.pool.available:
                self.preempt(self._victim())
            if sequence.state == State.DECODE:
                self.lengthen(sequence)

    def lengthen(self, sequence: Sequence) -> None:
        """Give a sequence that decodes one more block. Raises `LookupError` where none is available."""
        sequence.blocks.append(self.pool.take())
        self.tables_version += 1

    def _victim(self) -> Sequence:
        """The latest-arrived sequence of the most-served tenant that has something in the batch."""
        tenant = max((tenant for tenant in self.tenants.active() if tenant.running), key=lambda tenant: tenant.counter)
        return self._latest(tenant)

    def _latest(self, tenant: Tenant) -> Sequence:
        ours = (sequence for sequence in self.decoding if sequence.job.tenant == tenant.number)
        return max([*ours, *tenant.prefilling], key=lambda sequence: (-sequence.job.request.rank, sequence.job.order, sequence.choice))

    def _newcomers(self) -> list[Tenant]:
        """Tenants that wait for a first token and have no other business, beside others that decode."""
        if not self.decoding:
            return []
        return [tenant for tenant in self.tenants.active() if not tenant.decoding and (tenant.waiting or tenant.prefilling)]

    def _short_prompt(self, newcomers: list[Tenant]) -> int:
        """What is left of the next prompt, if that is a newcomer's and short, 0 otherwise. It isn't cut in two: its second part would wait
        for others' turns."""
        if not newcomers:
            return 0
        following = min((tenant for tenant in self.tenants.active() if tenant.waiting or tenant.prefilling), key=self._order)
        rest = following.next_prompt if following in newcomers else 0
        return rest if rest <= EXPRESS_PREFILL else 0

    def _order(self, tenant: Tenant) -> tuple[float, float, int]:
        """The smallest has the next turn."""
        return (0 if self._turn % FAIR_TURN == 0 else -tenant.urgency, *tenant.rank)

    def _held_up(self) -> bool:
        """Whether others' decodes would hold newcomers up, and sat out no step just now."""
        return not self._express and len(self.decoding) * self.pace.per_token > EXPRESS_SHARE * BRISK.seconds

    def _fill(self, plan: Plan, budget: int, tenants: list[Tenant]) -> None:
        """Spend `budget` tokens on prompts, the least-served tenant first."""
        scored = SCORED_ROWS
        self._closed = False
        turns = {tenant: self._turns(tenant, plan) for tenant in tenants if tenant.waiting or tenant.prefilling}
        while budget > 0 and turns:
            tenant = min(turns, key=self._order)
            sequence = next(turns[tenant], None)
            if sequence is None:
                del turns[tenant]
                continue
            count = self._piece(sequence) if self.deterministic else min(sequence.length - sequence.computed, budget)
            if unscored(sequence) < sequence.length:
                count = 0 if self.deterministic and count > scored else min(count, scored)
                scored -= count
                if count == 0:
                    continue
            self._turn += 1
            begin, end = sequence.computed, sequence.computed + count
            last = end == sequence.length
            score = unscored(sequence) < min(end, sequence.prompt_length - 1)
            rows = end - max(begin, unscored(sequence)) if score else int(last)
            plan.chunks.append(Chunk(sequence, begin, end, rows, last, score))
            budget -= count
            self._charge_prompt(tenant, sequence.job, end)
            if last and not tenant.decoding and len(turns) > 1:
                # A tenant's first token comes with this step; other tenants' prompts must not make it a long one.
                budget = min(budget, LEAST_PREFILL)
        for rest in turns.values():
            rest.close()

    def _piece(self, sequence: Sequence) -> int:
        """Tokens that a sequence computes next, never more and never less, so that they round alike whenever they are computed."""
        begin, end = sequence.computed, sequence.prompt_length
        return 1 if begin >= end else min(PIECE - begin % PIECE, end - begin)

    def _turns(self, tenant: Tenant, plan: Plan) -> Generator[Sequence]:
        """A tenant's sequences with something to compute, in order; waiting ones are admitted as their turn comes."""
        yield from tuple(tenant.prefilling)
        passed: list[Sequence] = []
        try:
            while tenant.waiting and not self._closed and len(passed) <= self.max_sequences:
                sequence = tenant.waiting.popleft()
                chain = self._reusable(sequence)
                if chain is None:
                    passed.append(sequence)
                    continue
                if not self._admit(tenant, sequence, chain, plan):
                    # Nobody served more may take the blocks that this one waits for.
                    self._closed = True
                    tenant.waiting.appendleft(sequence)
                    return
                yield sequence
        finally:
            tenant.waiting.extendleft(reversed(passed))

    def _reusable(self, sequence: Sequence) -> list[int] | None:
        """Cached blocks that a waiting sequence can begin with; None if it should wait for one that is being computed."""
        if not self.pool.caching:
            return []
        limit = sequence.length
        if sequence.job.scored:
            limit = min(limit, len(sequence.job.scores) - 1)
        self.prefix_keys.extend(sequence.keys, sequence.root, sequence.tokens, sequence.length)
        found: list[int] = []
        for key in sequence.keys[: limit // self.block_size]:
            block = self.pool.find(key)
            if block is None:
                return None if key in self._promised else found
            found.append(block)
        return found

    def _admit(self, tenant: Tenant, sequence: Sequence, chain: list[int], plan: Plan) -> bool:
        """Give a waiting sequence a slot and the blocks for all its tokens; False if they aren't there."""
        size = self.block_size
        # The last token is computed in any case, for the logits. Where its block is cached it is computed in a copy.
        whole = len(chain) * size == sequence.length
        blocks = -(-sequence.length // size)
        new = blocks - len(chain) + whole
        while not self._fits(new, chain):
            if tenant.running or not self._yield_to(tenant, new, chain, plan):
                return False
        for block in chain:
            self.pool.share(block)
        sequence.computed = len(chain) * size
        kept = chain
        if whole:
            kept, source = chain[:-1], chain[-1]
            copy = self.pool.take()
            plan.copies.append((source, copy))
            self._sources.append(source)
            kept = [*kept, copy]
            sequence.computed = sequence.length - 1
        for block in kept:
            sequence.blocks.append(block)
        while sequence.blocks.count < blocks:
            sequence.blocks.append(self.pool.take())
        sequence.promised = [key for key in sequence.keys[len(chain) :] if key not in self._promised]
        for key in sequence.promised:
            self._promised[key] = sequence
        job = sequence.job
        if sequence.generated == 0 and job.started_at is None:
            job.cached_tokens = sequence.computed
            job.charged = max(job.charged, sequence.computed)
        sequence.state = State.PREFILL
        tenant.prefilling.append(sequence)
        self.waiting -= 1
        self.prefilling += 1
        return True

    def _fits(self, new: int, chain: list[int]) -> bool:
        if self.running >= self.max_sequences:
            return False
        idle = sum(1 for block in chain if self.pool.idle(block))
        # Every second running sequence may take one more block before this one is thrown out again.
        return self.pool.available - idle - new >= self.running // 2

    def _yield_to(self, newcomer: Tenant, new: int, chain: list[int], plan: Plan) -> bool:
        """Preempt one sequence for a tenant that has nothing in the batch; False if that can't help."""
        givers = [tenant for tenant in self.tenants.active() if tenant is not newcomer and tenant.running > 1]
        if not givers:
            return False
        if self.running < self.max_sequences:
            held = sum(sequence.blocks.count for tenant in givers for sequence in self._sequences(tenant))
            if self.pool.available + held < new + len(chain):
                return False
        victim = self._latest(max(givers, key=lambda tenant: tenant.counter))
        gone = set(victim.blocks.array.tolist())
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not victim]
        plan.copies = [copy for copy in plan.copies if copy[1] not in gone]
        self.preempt(victim)
        return True

    def _sequences(self, tenant: Tenant) -> list[Sequence]:
        return [*tenant.prefilling, *(sequence for sequence in self.decoding if sequence.job.tenant == tenant.number)]

    def _charge_prompt(self, tenant: Tenant, job: Job, upto: int) -> None:
        """Charge for prompt tokens once, however often preemption makes the engine compute them."""
        upto = min(upto, len(job.prompt))
        if upto > job.charged:
            tenant.counter += PROMPT_WEIGHT * (upto - job.charged)
            job.charged = upto

    # --- what happened ---

    def copied(self) -> None:
        """The plan's copies are done; their sources may be given up again."""
        for block in self._sources:
            self.pool.release(block)
        self._sources.clear()

    def computed(self, sequence: Sequence, end: int) -> None:
        """The keys and values of a sequence's tokens up to `end` are in its blocks now."""
        size = self.block_size
        first, last = sequence.computed // size, end // size
        sequence.computed = end
        if last > first and self.pool.caching:
            self.prefix_keys.extend(sequence.keys, sequence.root, sequence.tokens, end)
            for index in range(first, last):
                self.pool.register(sequence.blocks[index], sequence.keys[index])
            self._keep_promises(sequence, sequence.keys[first:last])
        if sequence.state == State.PREFILL and end == sequence.length:
            tenant = self.tenants[sequence.job.tenant]
            tenant.prefilling.remove(sequence)
            self.prefilling -= 1
            self._decode(tenant, sequence)

    def charge_completion(self, job: Job, tokens: int) -> None:
        self.tenants[job.tenant].counter += COMPLETION_WEIGHT * tokens

    def fork(self, source: Sequence, sequence: Sequence) -> tuple[int, int] | None:
        """Let `sequence` go on from where `source` is, sharing its full blocks.

        Returns the copy (source, destination) to make of the last, partial block before the next step. Without a slot
        or a block the new sequence waits, and is computed from the cache or anew.
        """
        tenant = self.tenants[sequence.job.tenant]
        partial = source.computed % self.block_size != 0
        if self.running >= self.max_sequences or self.pool.available < partial:
            tenant.waiting.appendleft(sequence)
            self.waiting += 1
            return None
        shared = source.computed // self.block_size
        for index in range(shared):
            self.pool.share(source.blocks[index])
            sequence.blocks.append(source.blocks[index])
        sequence.keys = source.keys[:shared]
        sequence.computed = source.computed
        self._decode(tenant, sequence)
        if not partial:
            return None
        copy = self.pool.take()
        sequence.blocks.append(copy)
        return source.blocks[shared], copy

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks; it waits at the front of its tenant's queue."""
        tenant = self.tenants[sequence.job.tenant]
        self._stop(tenant, sequence)
        sequence.state = State.WAITING
        sequence.computed = 0
        tenant.waiting.appendleft(sequence)
        self.waiting += 1
        self.preemptions += 1

    def retire(self, sequences: Iterable[Sequence]) -> None:
        """Sequences are done, in whatever state they are: free what they hold."""
        for sequence in tuple(sequences):
            tenant = self.tenants[sequence.job.tenant]
            if sequence.state == State.WAITING:
                tenant.waiting.remove(sequence)
                self.waiting -= 1
            elif sequence.state != State.DONE:
                self._stop(tenant, sequence)
            sequence.state = State.DONE
            sequence.job.sequences.remove(sequence)
            self.tenants.leave_if_idle(tenant.number)

    def _decode(self, tenant: Tenant, sequence: Sequence) -> None:
        sequence.state = State.DECODE
        self.decoding.append(sequence)
        tenant.decoding += 1
        self.version += 1

    def _stop(self, tenant: Tenant, sequence: Sequence) -> None:
        """Take a running sequence out of the batch."""
        if sequence.state == State.DECODE:
            self.decoding.remove(sequence)
            tenant.decoding -= 1
            self.version += 1
        else:
            tenant.prefilling.remove(sequence)
            self.prefilling -= 1
            self._keep_promises(sequence, sequence.promised)
        self.pool.release_all(sequence.blocks.clear())

    def _keep_promises(self, sequence: Sequence, keys: Iterable[bytes]) -> None:
        """Keys that were computed, or won't be: nobody waits for them any longer."""
        for key in keys:
            if self._promised.get(key) is sequence:
                del self._promised[key]
