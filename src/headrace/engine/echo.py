"""An engine without a model, for tests and for measuring what everything around an engine costs.

It repeats what it was told: of a conversation in ChatML (the prompt holds an end-of-text token) the last turn's text,
without the line that names the role; of any other prompt all plain tokens, those that show text. Each running sequence
gets one token a step. The choice ends with `stop`, on its last token, once everything was said; with `ignore_eos`, and up to
`min_tokens`, it is said again from its beginning.
Its distribution has one outcome, so temperature, filters and seeds are honoured without any effect.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

from headrace.engine.fair_line import FairLine
from headrace.engine.pull import pull
from headrace.engine.pulse import Pulse
from headrace.engine.stops import StopStrings
from headrace.errors import ContextLengthExceeded, DeadlineExceeded, EngineUnavailable, HeadraceError, ModelError
from headrace.ports import Deliver, StepNotes, Tokenizer
from headrace.types import Delta, EngineCard, EngineStats, Event, FinishReason, GenerateRequest, Report

CAPABILITIES = frozenset(
    {"tokens", "seed", "n", "top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "resume"},
)


class EchoEngine:
    """`ports.Engine` and `ports.Submits`.

    `pace`: seconds a step takes, 0 for as fast as it goes; `load`: seconds that `start` takes; `says`: what it answers to
    everything, if it isn't empty; `memory`: bytes that it takes, as a model's weights would; `max_sequences`: most sequences in one step,
    more wait: the higher rank first, and within a rank the tenants take turns.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        name: str = "echo",
        context_length: int = 8192,
        fingerprint: str = "echo",
        max_sequences: int = 64,
        pace: float = 0.0,
        load: float = 0.0,
        says: str = "",
        memory: int = 0,
    ) -> None:
        self._answer = tokenizer.encode(says)
        self._memory = memory
        self._held = bytearray()
        self.pulse = Pulse()
        self.notes: StepNotes | None = None
        self._noted: list[str] = []
        self._tokenizer = tokenizer
        self._card = EngineCard(
            model=name,
            kind="echo",
            context_length=context_length,
            vocab_size=tokenizer.vocab_size,
            fingerprint=fingerprint,
            capabilities=CAPABILITIES,
        )
        self._max_sequences = max_sequences
        self._pace = pace
        self._load = load
        self._shows: dict[int, bool] = {}
        self._jobs: dict[str, _Job] = {}
        self._waiting = FairLine[_Sequence]()
        self._running: list[_Sequence] = []
        self._next_step: asyncio.Handle | None = None
        self._last_step = -math.inf
        self._closed = False
        self._steps = 0
        self._step_seconds = 0.0
        self._prompt_tokens = 0
        self._completion_tokens = 0

    @classmethod
    def from_options(
        cls,
        tokenizer: Tokenizer,
        options: Mapping[str, str],
        *,
        name: str,
        context_length: int,
        fingerprint: str,
        max_sequences: int,
    ) -> EchoEngine:
        """The engine that a model's address asks for, such as `echo?pace=0.02`. Raises `ModelError`."""
        known = {"pace": 0.0, "load": 0.0}
        says = options.get("says", "")
        memory = echo_memory(options)
        for option, value in options.items():
            if option in ("says", "memory"):
                continue
            if option not in known:
                raise ModelError(f"echo has no option {option!r}; it has context, memory, says, {', '.join(known)}.")
            try:
                known[option] = float(value)
            except ValueError:
                known[option] = math.nan
            if not 0 <= known[option] <= 3600:
                raise ModelError(f"echo's option {option}={value!r} should be a number of seconds, 0 to 3600.")
        return cls(
            tokenizer,
            name=name,
            context_length=context_length,
            fingerprint=fingerprint,
            max_sequences=max_sequences,
            says=says,
            memory=memory,
            **known,
        )

    async def start(self) -> EngineCard:
        self._held = bytearray(b"\1") * self._memory  # written to, so that it is really there
        await asyncio.sleep(self._load)
        return self._card

    def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Event]]:
        return pull(self, request)

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        if self._closed:
            raise EngineUnavailable("The engine is closed.")
        limit = self._card.context_length
        if len(request.prompt) + min(1, request.sampling.max_tokens) > limit:
            raise ContextLengthExceeded(f"The context is {limit} tokens, and the prompt has {len(request.prompt)}.")
        job = _Job(request, deliver, self._said(request.prompt), limit, self._tokenizer)
        self._jobs[request.id] = job
        if not job.sequences:
            asyncio.get_running_loop().call_soon(self._end, job, None)
        for sequence in job.sequences:
            self._waiting.add(sequence, rank=request.rank, tenant=request.tenant)
        self._prompt_tokens += len(request.prompt)
        self._step_soon()

    def cancel(self, request_id: str) -> None:
        job = self._jobs.get(request_id)
        if job is not None:
            self._end(job, None)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def close(self) -> None:
        self._closed = True
        for job in [*self._jobs.values()]:
            self._end(job, EngineUnavailable("The engine is closed."))
        if self._next_step is not None:
            self._next_step.cancel()
            self._next_step = None

    def _said(self, prompt: list[int]) -> list[int]:
        if self._answer:
            return self._answer
        ends = self._tokenizer.eos_ids
        end = next((at for at in range(len(prompt) - 1, -1, -1) if prompt[at] in ends), None)
        if end is None:
            return [token for token in prompt if self._plain(token)]
        begin = end
        while begin and self._plain(prompt[begin - 1]):
            begin -= 1
        turn = prompt[begin:end]
        role = next((at for at, token in enumerate(turn) if b"\n" in self._tokenizer.token_bytes(token)), -1)
        return turn[role + 1 :]

    def _plain(self, token: int) -> bool:
        shows = self._shows.get(token)
        if shows is None:
            stream = self._tokenizer.stream()
            shows = self._shows[token] = bool(stream.push(token) + stream.flush())
        return shows

    def _step_soon(self) -> None:
        if self._next_step is None and (self._running or self._waiting):
            loop = asyncio.get_running_loop()
            due = self._last_step + self._pace
            self._next_step = loop.call_at(due, self._step) if due > loop.time() else loop.call_soon(self._step)

    def _step(self) -> None:
        begun = time.perf_counter()
        now = self._last_step = asyncio.get_running_loop().time()
        self._next_step = None
        while self._waiting and len(self._running) < self._max_sequences:
            self._running.append(self._waiting.take())
        jobs = {sequence.job: None for sequence in self._running}
        self._note([job.request.id for job in jobs if job.fresh])
        for sequence in self._running:
            sequence.step(now)
            self._completion_tokens += min(1, sequence.index)
        self._steps += 1
        self._step_seconds += time.perf_counter() - begun
        self.pulse.end(self._completion_tokens)
        for job in jobs:
            if job.living:
                job.hand_over()
            else:
                self._end(job, None)
        self._running = [sequence for sequence in self._running if not sequence.done]
        for job in [*self._jobs.values()]:
            if now >= job.deadline:
                self._end(job, job.late(now))
        self._step_soon()

    def _note(self, fresh: list[str]) -> None:
        if self.notes is not None and (fresh or self._noted):
            self._noted = fresh
            self.notes.step(fresh)

    def _end(self, job: _Job, error: HeadraceError | None) -> None:
        if self._jobs.pop(job.request.id, None) is None:
            return
        if job.living:
            job.living = 0
            for sequence in job.sequences:
                sequence.done = True
            self._waiting.keep(lambda sequence: not sequence.done)
            self._running = [sequence for sequence in self._running if not sequence.done]
        if error is not None:
            job.deliver(error)
        else:
            job.events.append(job.report())
            job.hand_over()


def echo_memory(options: Mapping[str, str]) -> int:
    """Bytes that an echo's option `memory`, in MiB, makes it take. Raises `ModelError`."""
    value = options.get("memory", "0")
    if not value.isascii() or not value.isdigit() or int(value[:12]) > 1024 * 1024:
        raise ModelError(f"echo's option memory={value!r} should be a whole number of MiB.")
    return int(value) * 2**20


class _Job:
    """A request: its sequences, and their events until the step is over."""

    def __init__(self, request: GenerateRequest, deliver: Deliver, said: list[int], context_length: int, tokenizer: Tokenizer) -> None:
        self.request = request
        self.deliver = deliver
        self.said = said
        self.limit = min(request.sampling.max_tokens, context_length - len(request.prompt))
        self.received = asyncio.get_running_loop().time() - request.waited
        self.deadline = math.inf if request.timeout is None else self.received + request.timeout
        self.started: float | None = None
        self.fresh = True
        """No token of it was made yet, by this engine."""
        self.events: list[Event] = []
        resume = request.resume
        self.before = 0 if resume is None else sum(len(resume.generated[choice]) for choice in resume.ended)
        """Tokens of choices that have ended elsewhere."""
        self.sequences = [
            _Sequence(self, choice, tokenizer, () if resume is None else resume.generated[choice])
            for choice in range(request.sampling.n)
            if resume is None or choice not in resume.ended
        ]
        self.living = len(self.sequences)

    def hand_over(self) -> None:
        events, self.events = self.events, []
        self.fresh = False
        self.deliver(events)

    def late(self, now: float) -> DeadlineExceeded:
        if self.started is None:
            return DeadlineExceeded(f"The request waited in the queue for all of its {self.request.timeout:g} s.")
        generated = self.before + sum(sequence.index for sequence in self.sequences)
        return DeadlineExceeded(
            f"The request took longer than its {self.request.timeout:g} s: {self.started - self.received:.2f} s in the queue, "
            f"{now - self.started:.2f} s in decode, for {generated} tokens."
        )

    def report(self) -> Report:
        now = asyncio.get_running_loop().time()
        started = now if self.started is None else self.started
        return Report(
            # A request that never left the queue has cost nothing; one that goes on has left another engine's.
            prompt_tokens=0 if self.started is None and self.request.resume is None else len(self.request.prompt),
            cached_tokens=0,
            completion_tokens=self.before + sum(sequence.index for sequence in self.sequences),
            queue_ms=1000 * (started - self.received),
            prefill_ms=0.0,
            decode_ms=1000 * (now - started),
        )


class _Sequence:
    """One choice as it grows."""

    def __init__(self, job: _Job, choice: int, tokenizer: Tokenizer, generated: Sequence[int]) -> None:
        self.job = job
        self.choice = choice
        self.index = len(generated)
        self.done = False
        self._text = tokenizer.stream()
        self._stops = StopStrings(job.request.sampling.stop)
        for count, token in enumerate(generated, 1):
            # Said already; what is held back after them is what was held back there.
            text = self._text.push(token)
            if count >= job.request.sampling.min_tokens:
                self._stops.push(text)

    def step(self, now: float) -> None:
        job = self.job
        sampling = job.request.sampling
        if job.started is None:
            job.started = now
        if not job.said or job.limit == 0:
            self._finish(Delta(self.choice, 0, (), "", "stop" if not job.said else "length"))
            return
        token = job.said[self.index % len(job.said)]
        self.index += 1
        finish: FinishReason | None = None
        stop: str | int | None = None
        if token in sampling.stop_token_ids and self.index > sampling.min_tokens:
            finish, stop = "stop", token
            text = self._text.flush() + self._stops.flush()
        else:
            text = self._text.push(token)
            said_once = self.index >= len(job.said) and not sampling.ignore_eos
            if said_once and self.index >= sampling.min_tokens:
                finish = "stop"
            elif self.index >= job.limit:
                finish = "length"
            if finish is not None:
                text += self._text.flush()
            if self.index >= sampling.min_tokens:
                text, stop = self._stops.push(text)
                if stop is not None:
                    finish = "stop"
            if finish is not None and stop is None:
                text += self._stops.flush()
        delta = Delta(self.choice, self.index - 1, (token,), text, finish, stop)
        if finish is None:
            job.events.append(delta)
        else:
            self._finish(delta)

    def _finish(self, delta: Delta) -> None:
        self.done = True
        self.job.living -= 1
        self.job.events.append(delta)
