"""One step of the engine: take what is due, plan, run the model, draw tokens, and hand out what came of it.

An error belongs to one request. Where the model refuses a batch, halves of it are tried until the culprit is alone;
where a row can't be sampled or its text can't be made, its request fails and no other.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many

import numpy as np

from headrace.engine.batch import Decodes, Guesses, build
from headrace.engine.blocks import BlockPool
from headrace.engine.completion import Completion, TokenWords
from headrace.engine.draw import Draw
from headrace.engine.lookup import LEAST, WIDTHS, Lookup
from headrace.engine.pace import Pace
from headrace.engine.pulse import Pulse
from headrace.engine.sampler import Picked, SequenceSampler, sample_rows, score_rows, take_best
from headrace.engine.scheduler import Chunk, Scheduler
from headrace.engine.sequence import Job, Sequence, State
from headrace.engine.steady_rows import SteadyRows
from headrace.errors import DeadlineExceeded, EngineDied, HeadraceError, RequestFailed
from headrace.ports import Deliver, ForwardBatch, ForwardResult, Rewinds, Runner, StepNotes, Tokenizer
from headrace.types import Delta, EngineStats, Event, GenerateRequest, PromptScores, Report, TokenLogprob

Outbox = list[tuple[Deliver, Many[Event] | HeadraceError]]

logger = logging.getLogger(__name__)


class Stepper:
    """The engine without threads: `add` requests, `step` until `idle`, and deliver what is in `outbox` after each step."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        max_sequences: int,
        step_tokens: int,
        prefix_cache: bool,
        prompt_lookup: bool = True,
        deterministic: bool = False,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.context_length = min(context_length, runner.num_blocks * runner.block_size)
        """Most tokens of a sequence: the model's limit, or all the blocks there are."""
        self.vocab_size = min(runner.vocab_size, tokenizer.vocab_size)
        """Ids that both the model and the tokenizer know."""
        self.outbox: Outbox = []
        self.pulse = Pulse()
        """Where each step is noted as it begins and ends."""
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos = frozenset(tokenizer.eos_ids)
        self._words = TokenWords(tokenizer)
        self._clock = clock
        self._pace = pace or Pace()
        self._tries_out = not deterministic and isinstance(runner, Rewinds) and runner.rewinds
        """Whether a token may be computed that isn't known to be the next."""
        self._guessing = prompt_lookup and self._tries_out
        self._rows = SteadyRows()
        self._step_tokens = step_tokens
        self._scheduler = Scheduler(
            BlockPool(runner.num_blocks, caching=prefix_cache and not deterministic),
            block_size=runner.block_size,
            max_sequences=min(max_sequences, step_tokens - 1),
            step_tokens=step_tokens,
            pace=self._pace,
            deterministic=deterministic,
        )
        self.notes: StepNotes | None = None
        """Where it is noted who takes part in a step without having been given a token."""
        self._fresh: list[str] = []
        """Those whose first token may have come of the last step, and was not handed over before this one."""
        self._noted = False
        self._decodes = Decodes(runner.block_size)
        self._jobs: dict[str, Job] = {}
        self._touched: list[Job] = []
        self._deadlines: list[tuple[float, int, Job]] = []
        self._order = 0
        self._failures = 0
        self._steps = 0
        self._step_seconds = 0.0
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._guessed_tokens = 0
        self._right_tokens = 0

    # --- what comes in ---

    @property
    def idle(self) -> bool:
        return not self._jobs

    def add(self, request: GenerateRequest, deliver: Deliver, received_at: float) -> None:
        """Queue a request that `admissible` lets pass."""
        self._order += 1
        job = Job(request, deliver, order=self._order, received_at=received_at - request.waited, context_length=self.context_length)
        self._jobs[job.id] = job
        if request.timeout is not None:
            heapq.heappush(self._deadlines, (job.deadline, job.order, job))
        self._scheduler.add(job)
        if not job.sequences:
            self._end(job)

    def cancel(self, request_id: str) -> None:
        """Free a request's sequences and blocks now; it gets its `Report`. Unknown ids are ignored."""
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job)

    def cached_tokens(self, request_id: str) -> int:
        """Of a running request's prompt, those that the prefix cache had; may be asked from any thread."""
        job = self._jobs.get(request_id)
        return 0 if job is None else job.cached_tokens

    def fail_all(self, error: Callable[[], HeadraceError]) -> None:
        """End every request with an error, as the engine goes."""
        for job in tuple(self._jobs.values()):
            self._fail(job, error())

    def stats(self) -> EngineStats:
        """A snapshot; may be taken from any thread."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            blocks_used=scheduler.pool.used,
            blocks_total=scheduler.pool.num_blocks,
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=scheduler.preemptions,
            guessed_tokens=self._guessed_tokens,
            right_tokens=self._right_tokens,
        )

    # --- a step ---

    def step(self) -> bool:
        """Run one step and put what came of it in the outbox; False where there was nothing to compute."""
        began = self._clock()
        if self._deadlines:
            self._expire(began)
        plan = self._scheduler.plan(began)
        if plan.decodes or plan.chunks:
            for chunk in plan.chunks:
                self._begin(chunk.sequence, began)
            chunks = [chunk for chunk in plan.chunks if chunk.sequence.state == State.PREFILL]
            self._note(chunks)
            if plan.copies:
                self._runner.copy_blocks(plan.copies)
            self._scheduler.copied()
            if plan.decodes or chunks:
                self._compute(plan.decodes, chunks)
            seconds = self._clock() - began
            self._steps += 1
            self._step_seconds += seconds
            self._pace.note(len(plan.decodes) + sum(chunk.end - chunk.begin for chunk in chunks), seconds, prompts=bool(chunks))
        for job in self._touched:
            if job.events:
                self.outbox.append((job.deliver, job.events))
                job.events = []
        self._touched.clear()
        self.pulse.end(self._completion_tokens)
        return bool(plan.decodes or plan.chunks)

    def _note(self, chunks: list[Chunk]) -> None:
        """If the process dies of this step, one of these may be why."""
        before, self._fresh = self._fresh, [chunk.sequence.job.id for chunk in chunks if chunk.sequence.job.first_token_at is None]
        if self.notes is not None and (self._fresh or before or self._noted):
            suspects = [*dict.fromkeys(before + self._fresh)]
            self._noted = bool(suspects)
            spans = []
            for name in suspects:
                job = self._jobs.get(name)
                done = 0 if job is None else sum([sequence.computed for sequence in job.sequences])
                # One that decodes already computes a token.
                spans.append((done, done + max(1, sum([chunk.end - chunk.begin for chunk in chunks if chunk.sequence.job is job]))))
            self.notes.step(suspects, spans)

    def _expire(self, now: float) -> None:
        """End the requests whose time is up, saying where it went."""
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].ended):
            job = heapq.heappop(self._deadlines)[2]
            if job.ended:
                continue
            queue, prefill, decode = job.phases(now)
            phase = "waiting in the queue" if job.started_at is None else "in prefill" if job.first_token_at is None else "decoding"
            message = (
                f"The request ran into its time limit of {job.request.timeout:g} s while it was {phase}: {queue / 1e3:.2f} s in the"
                f" queue, {prefill / 1e3:.2f} s in prefill, {decode / 1e3:.2f} s decoding ({job.completion_tokens} tokens generated)."
            )
            self._fail(job, DeadlineExceeded(message))

    def _begin(self, sequence: Sequence, now: float) -> None:
        """Make ready what a sequence's first drawn token will need, before it takes part in a step."""
        job = sequence.job
        if job.started_at is None:
            job.started_at = now
            self._prompt_tokens += len(job.prompt)
            self._cached_tokens += job.cached_tokens
        if sequence.completion is None and job.limit > len(job.prompt):
            try:
                sequence.completion = self._completion(job, sequence.choice)
            except Exception as error:  # noqa: BLE001  an error belongs to one request
                self._fail(job, _failure(error, "Its sampling could not be set up"))

    def _completion(self, job: Job, choice: int) -> Completion:
        sampling = job.request.sampling
        sampler = SequenceSampler(
            sampling,
            job.request.prompt,
            vocab_size=self._runner.vocab_size,
            choice=choice,
            eos_ids=self._eos,
            fallback_seed=job.seed,
            generated=job.generated(choice),
        )
        limit = job.limit - len(job.prompt)
        completion = Completion(sampling, sampler, self._tokenizer, self._words, choice=choice, limit=limit)
        completion.replay(job.generated(choice))
        return completion

    def _compute(self, decodes: list[Sequence], chunks: list[Chunk]) -> None:
        """Compute a step. Raises `EngineDied` where the model fails every request, and a harmless one too."""
        parts, failures = len(decodes) + len(chunks), self._failures
        self._run(decodes, chunks)
        if self._failures - failures >= parts:
            self._probe()

    def _run(self, decodes: list[Sequence], chunks: list[Chunk]) -> None:
        """Run the model over a batch, and over ever smaller parts of it where it refuses."""
        scheduler = self._scheduler
        guesses = self._guess(decodes, chunks) if self._guessing else None
        kept = 0
        if guesses is None and not chunks and self._tries_out:
            kept = self._rows.missing(len(decodes))
            guesses = self._keep_rows(decodes, kept) if kept else None
        if guesses is None and not chunks and decodes is scheduler.decoding:
            batch = self._decodes.batch(decodes, scheduler.version, scheduler.tables_version)
        else:
            self._decodes.forget()
            batch = build(decodes, chunks, scheduler.block_size, guesses)
        decodes = list(decodes)
        refused: Exception | None = None
        try:
            draw = Draw(decodes, chunks, guesses)
            for leader in draw.leaders:
                draw.add(leader, [self._sibling(leader, choice) for choice in range(1, leader.job.request.sampling.n)])
            batch.best_only = draw.best_only
            self.pulse.begin(self._pace.seconds(len(batch.input_ids)))
            result = self._runner.forward(batch)
            if not draw.samplers:
                picks: list[Picked | Exception] = []
            elif batch.best_only:
                picks = take_best(result, draw.rows)
            else:
                picks = sample_rows(result, draw.samplers, draw.rows, draw.ahead)
            scores = [(chunk.sequence.job, len(chunk.sequence.job.scores), self._score(chunk, result, row)) for chunk, row in draw.scored]
        except Exception as error:  # noqa: BLE001  what the model can't compute must only end the request at fault
            refused = error
        if refused is not None:
            self._decodes.forget()
            self._rows.forget()
            self._divide(decodes, chunks, refused)
            return
        if chunks:
            self._rows.forget()
        else:
            self._rows.computed(len(batch.input_ids), kept=kept)
        block_size = scheduler.block_size
        for sequence in decodes:
            self._one_more(sequence, block_size)
        for chunk in chunks:
            scheduler.computed(chunk.sequence, chunk.end)
        for job, first, scored in scores:
            # Choices that go on after a death may have had the same positions scored.
            job.scores += scored[len(job.scores) - first :]
        if draw.first:
            self._first_tokens(draw)
        if draw.guesses is None or draw.ahead is None:
            for sequence, picked in zip(draw.sequences, picks, strict=True):
                if sequence.state != State.DONE:
                    self._take(sequence, picked)
        else:
            self._take_while_right(draw, picks, draw.guesses, draw.ahead)

    def _guess(self, decodes: list[Sequence], chunks: list[Chunk]) -> Guesses | None:
        """For each sequence that decodes the tokens to be verified in this step; None where there are none at all."""
        width = 0 if chunks else WIDTHS.get(len(decodes), 0)
        if not width or len(decodes) * (1 + width) > self._step_tokens:
            return None
        guesses: Guesses = []
        foreseen = 0.0
        for sequence in decodes:
            if not _can_go_ahead(sequence):
                guesses.append([])
                continue
            most = self._ahead(sequence, width)
            if sequence.lookup is None:
                sequence.lookup = Lookup(sequence.tokens[: sequence.length].tolist())
            guess = sequence.lookup.guess(most)
            foreseen += sequence.lookup.share
            guesses.append(guess + _anything(sequence, most - len(guess)))
        guessed = sum(map(len, guesses))
        if not guessed or foreseen < LEAST * len(decodes):
            return None
        self._guessed_tokens += guessed
        return guesses

    def _ahead(self, sequence: Sequence, most: int) -> int:
        """How many tokens after its next one can be tried out for a sequence, `most` at most."""
        scheduler = self._scheduler
        room = sequence.blocks.count * scheduler.block_size - sequence.length
        if room < most and sequence.job.limit > sequence.length + room and scheduler.pool.available > scheduler.running:
            # It will need the block in a moment, if nothing else ends it.
            scheduler.lengthen(sequence)
            room += scheduler.block_size
        return max(0, min(room, self.context_length - sequence.length - 1, most))

    def _keep_rows(self, decodes: list[Sequence], kept: int) -> Guesses | None:
        """Anything to be tried out in `kept` further rows; None where there is no room for it."""
        guesses: Guesses = []
        for sequence in decodes:
            some = self._ahead(sequence, kept) if kept and _can_go_ahead(sequence) else 0
            kept -= some
            guesses.append(_anything(sequence, some))
        if kept:
            return None
        self._guessed_tokens += sum(map(len, guesses))
        return guesses

    def _take_while_right(self, draw: Draw, picks: list[Picked | Exception], guesses: list[int | None], ahead: list[int]) -> None:
        """Take in each sequence's tokens up to the first that isn't what the row after it was computed for."""
        block_size = self._scheduler.block_size
        stands = True
        for sequence, picked, guess, further in zip(draw.sequences, picks, guesses, ahead, strict=True):
            if further and not stands:
                continue
            if further and sequence.state != State.DONE:
                self._one_more(sequence, block_size)
                self._right_tokens += 1
            if sequence.state != State.DONE:
                self._take(sequence, picked)
            stands = sequence.state != State.DONE and not isinstance(picked, Exception) and picked.token == guess

    def _one_more(self, sequence: Sequence, block_size: int) -> None:
        """One more of a decoding sequence's tokens has its keys and values."""
        if (sequence.computed + 1) % block_size:
            sequence.computed += 1
        else:
            self._scheduler.computed(sequence, sequence.computed + 1)

    def _divide(self, decodes: list[Sequence], chunks: list[Chunk], error: Exception) -> None:
        """Try the halves of a batch that failed; a sequence that fails alone fails its request."""
        if len(decodes) + len(chunks) == 1:
            job = (decodes[0] if decodes else chunks[0].sequence).job
            self._fail(job, _failure(error, "The model could not compute this request"))
            self._failures += 1
            return
        if decodes and chunks:
            halves: list[tuple[list[Sequence], list[Chunk]]] = [(decodes, []), ([], chunks)]
        else:
            at, chunk_at = len(decodes) // 2, len(chunks) // 2
            halves = [(decodes[:at], chunks[:chunk_at]), (decodes[at:], chunks[chunk_at:])]
        for some_decodes, some_chunks in halves:
            # An earlier half may have ended a request that has sequences in this one.
            left = [sequence for sequence in some_decodes if sequence.state == State.DECODE]
            left_chunks = [chunk for chunk in some_chunks if chunk.sequence.state == State.PREFILL]
            if left or left_chunks:
                self._run(left, left_chunks)

    def _probe(self) -> None:
        """One token on a block of its own; a model that can't do that can't do anything."""
        pool = self._scheduler.pool
        if not pool.available:
            return
        block = pool.take()
        one = np.zeros(1, np.int64)
        batch = ForwardBatch(
            input_ids=one,
            position_ids=one,
            past_lens=np.zeros(1, np.int32),
            subsequence_begins=np.array([0, 1], np.int32),
            block_indices=np.array([block], np.int32),
            block_indices_begins=np.array([0, 1], np.int32),
            max_context_len=1,
            rows=one,
        )
        try:
            self._runner.forward(batch)
        except Exception as error:
            raise EngineDied(f"The model can't compute anything any longer: {error}") from error
        finally:
            pool.release(block)

    def _sibling(self, leader: Sequence, choice: int) -> Sequence:
        sibling = Sequence(leader.job, choice, leader.root)
        sibling.completion = self._completion(leader.job, choice)
        return sibling

    def _score(self, chunk: Chunk, result: ForwardResult, row: int) -> list[TokenLogprob]:
        """Logprobs of the prompt tokens that follow a chunk's scored positions; `row` is the first position's."""
        sequence = chunk.sequence
        first = len(sequence.job.scores)
        last = min(chunk.end, sequence.prompt_length - 1)
        targets: list[int] = sequence.tokens[first : last + 1].tolist()
        most = sequence.job.request.sampling.prompt_logprobs or 0
        picks = score_rows(result, list(range(row, row + len(targets))), targets, most)
        return [self._words.logprob(picked, most) for picked in picks]

    def _first_tokens(self, draw: Draw) -> None:
        """Requests whose prompt is complete with this step: their scores, and the choices that begin here."""
        now = self._clock()
        copies = []
        for sequence in draw.first:
            job = sequence.job
            if job.first_token_at is None:
                job.first_token_at = now
                if job.scored and not job.scores_said:
                    self._emit(job, PromptScores(tuple(job.scores)))
            if sequence.completion is None:
                for choice in range(job.request.sampling.n):
                    self._emit(job, Delta(choice, 0, (), "", "length"))
                self._end(job)
        for leader, siblings in draw.forks:
            leader.job.forked = True
            for sibling in siblings:
                leader.job.sequences.append(sibling)
                copy = self._scheduler.fork(leader, sibling)
                if copy is not None:
                    copies.append(copy)
        if copies:
            self._runner.copy_blocks(copies)

    def _take(self, sequence: Sequence, picked: Picked | Exception) -> None:
        """Take in the token that was drawn for a sequence."""
        job, completion = sequence.job, sequence.completion
        if isinstance(picked, Exception) or completion is None:
            self._fail(job, _failure(picked, "The next token could not be drawn"))
            return
        try:
            delta = completion.accept(picked, sequence.length - sequence.prompt_length)
        except Exception as error:  # noqa: BLE001  an error belongs to one request
            self._fail(job, _failure(error, "The completion's text could not be made"))
            return
        sequence.append(picked.token)
        if sequence.lookup is not None:
            sequence.lookup.take(picked.token)
        job.completion_tokens += 1
        self._completion_tokens += 1
        self._scheduler.charge_completion(job, 1)
        self._emit(job, delta)
        if delta.finish is not None:
            self._scheduler.retire((sequence,))
            if not job.sequences:
                self._end(job)

    # --- how requests end ---

    def _emit(self, job: Job, event: Event) -> None:
        if not job.events:
            self._touched.append(job)
        job.events.append(event)

    def _end(self, job: Job) -> None:
        self._forget(job)
        queue, prefill, decode = job.phases(self._clock())
        # A request that never left the queue has cost nothing; one that goes on has left another engine's.
        prompt = 0 if job.started_at is None and job.resume is None else len(job.prompt)
        self._emit(job, Report(prompt, job.cached_tokens, job.completion_tokens, queue, prefill, decode))

    def _fail(self, job: Job, error: HeadraceError) -> None:
        if job.ended:
            return
        self._forget(job)
        if job.events:
            self.outbox.append((job.deliver, job.events))
            job.events = []
        self.outbox.append((job.deliver, error))
        if isinstance(error, RequestFailed):
            logger.warning("request failed in the engine", extra={"request_id": job.id}, exc_info=error.__cause__ or error)

    def _forget(self, job: Job) -> None:
        job.ended = True
        del self._jobs[job.id]
        self._scheduler.retire(job.sequences)


def _can_go_ahead(sequence: Sequence) -> bool:
    """Whether tokens can be drawn for a sequence before the one in front of them is taken in."""
    return sequence.completion is not None and not sequence.completion.sampler.needs_full


def _anything(sequence: Sequence, count: int) -> list[int]:
    """Will do to keep a step's shape: it is verified like any guess."""
    return [int(sequence.tokens[sequence.length - 1])] * count


def _failure(error: Exception | Picked, what: str) -> HeadraceError:
    """What a request is told of an error that it caused."""
    if isinstance(error, HeadraceError):
        return error
    failed = RequestFailed(f"{what}: {error}" if str(error) else f"{what}.")
    if isinstance(error, Exception):
        failed.__cause__ = error
    return failed
