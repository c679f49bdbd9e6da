"""The vllm engine: vLLM's `AsyncLLM` behind our seam. Token ids go in and token ids come out; text and its ends are ours.

vLLM schedules and computes in processes of its own. Each choice of a request is a request to it; what it sends is read by one task a
choice, made into text, looked through for stop strings, and delivered. When its engine process dies, this engine has failed for good.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.engine.capabilities import DRAWS_TOKENS
from headrace.engine.completion import CompletionText, TokenWords
from headrace.engine.pull import pull
from headrace.engine.pulse import Pulse
from headrace.engine.vllm_load import Wanted, load
from headrace.engine.vllm_sampling import Places, generated, picked, sampling_params
from headrace.errors import (
    BadRequest,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    InvalidParameter,
    ModelError,
    RequestFailed,
)
from headrace.ports import Deliver, StepNotes, Tokenizer
from headrace.types import Delta, EngineCard, EngineStats, Event, GenerateRequest, PromptScores, Report, Sampling

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM

LAST_WORDS = 1.0
"""Seconds between the end of vLLM's engine and that of its requests: a worker is gone by then, and its clients go on elsewhere."""
SLOWEST = 3.0
"""How many times as slow as the warm-up a step's tokens may be before it takes longer than expected."""
COMPILING = 20.0
"""Seconds that any step may be expected to take: vLLM compiles what a request is the first to need. A worker is replaced after three times
as long (`stalls`)."""
_PROMPT = 256
"""Tokens of the prompts that are computed before anyone waits."""
_EVERYTHING = Sampling(
    max_tokens=3,
    min_tokens=2,
    temperature=0.8,
    top_p=0.9,
    top_k=40,
    min_p=0.01,
    seed=1,
    presence_penalty=0.1,
    frequency_penalty=0.1,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    logprobs=2,
    n=2,
)
"""What is compiled on first use, so that it isn't a caller's."""

logger = logging.getLogger(__name__)


class VllmEngine:
    """`ports.Engine`, `ports.Submits`, `ports.TellsCached` and `ports.NotesSteps` over one `AsyncLLM`."""

    def __init__(self, wanted: Wanted, tokenizer: Tokenizer, *, name: str, fingerprint: str) -> None:
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        self.pulse = Pulse()
        self.notes: StepNotes | None = None
        self._wanted = wanted
        self._tokenizer = tokenizer
        self._words = TokenWords(tokenizer)
        self._name = name
        self._fingerprint = fingerprint
        self._llm: AsyncLLM | None = None
        self._card: EngineCard | None = None
        self._jobs: dict[str, _Job] = {}
        self._places = Places()
        self._closing = False
        self._blocks = 0
        self._running = self._waiting = 0
        self._kv_usage = 0.0
        self._steps = 0
        self._step_seconds = 0.0
        self._step_began = 0.0
        self._expected = 0.0
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._preemptions = 0

    async def start(self) -> EngineCard:
        """Start vLLM, and compute something. Raises `ModelError`."""
        if self._card is not None:
            return self._card
        llm = await asyncio.to_thread(load, self._wanted, lambda *_: _Stats(self._stepped))
        self._llm = llm
        config = llm.vllm_config
        self._blocks = config.cache_config.num_gpu_blocks or 0
        self._card = EngineCard(
            model=self._name,
            kind="vllm",
            context_length=config.model_config.max_model_len,
            vocab_size=config.model_config.get_vocab_size(),
            fingerprint=self._fingerprint,
            capabilities=DRAWS_TOKENS,
        )
        try:
            await self._warm_up(config.scheduler_config.max_num_batched_tokens)
            assert llm.output_handler is not None
            # Also without a request that would hear of it.
            llm.output_handler.add_done_callback(lambda _: self.core_died(llm.dead_error))
        except HeadraceError as error:
            await self.close()
            raise ModelError(f"vLLM has loaded {self._name}, but can't compute with it: {error.message}") from error
        return self._card

    def generate(self, request: GenerateRequest) -> AsyncIterator[list[Event]]:
        """Events of one request; whoever leaves early cancels it."""
        return pull(self, request)

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Queue a request; refusals are delivered, too."""
        refusal = self._refusal(request)
        if refusal is not None:
            asyncio.get_running_loop().call_soon(deliver, refusal)
            return
        assert self._llm is not None
        assert self._card is not None
        self._jobs[request.id] = job = _Job(self, request, deliver, self._card.context_length)
        if len(self._jobs) == 1:
            self._step_began = time.monotonic()
            self._work_on()
        job.begin(self._llm, self._places.take(request))
        self._note()

    def cancel(self, request_id: str) -> None:
        """Abort a request; its `Report` is delivered."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.end(None)

    def stats(self) -> EngineStats:
        return EngineStats(
            running=self._running if self._jobs else 0,
            waiting=self._waiting if self._jobs else 0,
            blocks_used=round(self._kv_usage * self._blocks) if self._jobs else 0,
            blocks_total=self._blocks,
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            preemptions=self._preemptions,
        )

    def cached_tokens(self, request_id: str) -> int:
        """Of a running request's prompt, those that the prefix cache had."""
        job = self._jobs.get(request_id)
        return 0 if job is None else job.cached_tokens

    async def close(self) -> None:
        """End what runs, and vLLM's processes."""
        self._closing = True
        for job in [*self._jobs.values()]:
            job.end(EngineUnavailable("The engine is stopping.", retry_after=1))
        llm, self._llm = self._llm, None
        if llm is not None:
            await asyncio.to_thread(llm.shutdown)

    # What its requests say

    @property
    def words(self) -> TokenWords:
        return self._words

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def first_token_of(self, job: _Job) -> None:
        self._places.served(job.place)
        self._prompt_tokens += len(job.request.prompt)
        self._cached_tokens += job.cached_tokens
        self._note()

    def generated(self, tokens: int) -> None:
        self._completion_tokens += tokens

    def is_over(self, job: _Job) -> None:
        self._jobs.pop(job.request.id, None)
        if not self._jobs:
            self._places.rest()
            self.pulse.rest()
        self._note()

    def core_died(self, error: BaseException) -> None:
        """vLLM's engine process is gone, and none of its requests will hear of it again."""
        if self.failed.is_set() or self._closing:
            return
        logger.error("vLLM's engine process died", exc_info=error)
        self.failure = error
        self.failed.set()
        asyncio.get_running_loop().call_later(LAST_WORDS, self._end_all)

    def _end_all(self) -> None:
        for job in [*self._jobs.values()]:
            job.end(EngineDied("The engine died."))

    # The step loop, as far as it is seen from here

    def _stepped(self, scheduler: Any, iteration: Any) -> None:
        """vLLM has turned once."""
        now = time.monotonic()
        if scheduler is not None:
            self._running, self._waiting = scheduler.num_running_reqs, scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs
            self._kv_usage = scheduler.kv_cache_usage
        if iteration is not None:
            self._steps += 1
            self._preemptions += iteration.num_preempted_reqs
            self._step_seconds += now - self._step_began
            self._step_began = now
        self.pulse.end(self._completion_tokens)
        if self._jobs:
            self._work_on()

    def _work_on(self) -> None:
        self.pulse.begin(self._expected)

    def _note(self) -> None:
        """Who may be in the next step without having got a token yet."""
        if self.notes is not None:
            self.notes.step([job.request.id for job in self._jobs.values() if not job.got_on])

    async def _warm_up(self, step_tokens: int) -> None:
        """Libraries compile for what they meet; then the longest step's time is guessed from that of one prompt."""
        assert self._card is not None
        count = max(1, min(_PROMPT, self._card.context_length - 8))
        plain = Sampling(max_tokens=2, temperature=0.0, ignore_eos=True)
        for number, sampling in enumerate((_EVERYTHING, msgspec.structs.replace(plain, prompt_logprobs=1), plain)):
            began = time.monotonic()
            # The tokens differ, so that none are in the prefix cache.
            request = GenerateRequest(id=f"warm-up-{number}", prompt=[number] * count, sampling=sampling)
            async for _ in self.generate(request):
                pass
            took = time.monotonic() - began
        self._expected = max(COMPILING, SLOWEST * took * max(1.0, step_tokens / count))
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = self._steps = 0
        self._step_seconds = 0.0

    def _refusal(self, request: GenerateRequest) -> HeadraceError | None:
        """Why a request can't be served at all, if so."""
        if self.failed.is_set():
            return EngineDied("The engine died.")
        if self._card is None or self._llm is None or self._closing:
            return EngineUnavailable("The engine is not running." if not self._closing else "The engine is stopping.", retry_after=1)
        if request.id in self._jobs:
            return BadRequest(f"A request with the id {request.id!r} is already running.")
        count, limit, vocabulary = len(request.prompt), self._card.context_length, self._card.vocab_size
        if count == 0:
            return InvalidParameter("The prompt is empty.", param="prompt")
        # vLLM can't but generate a token, so scoring alone needs room for one, too.
        if count >= limit:
            return ContextLengthExceeded(
                f"The prompt has {count} tokens; the model's context holds {limit} tokens, prompt and completion together.", param="prompt"
            )
        if min(request.prompt) < 0 or max(request.prompt) >= vocabulary:
            return InvalidParameter(f"Token ids go from 0 to {vocabulary - 1}; the prompt has others.", param="prompt")
        unknown = next((token for token in request.sampling.logit_bias if not 0 <= token < vocabulary), None)
        if unknown is not None:
            return InvalidParameter(f"Token ids go from 0 to {vocabulary - 1}; logit_bias has {unknown}.", param="logit_bias")
        resume = request.resume
        if resume is not None:
            room = min(request.sampling.max_tokens, limit - count)
            said = [token for tokens in resume.generated for token in tokens]
            if (
                len(resume.generated) != request.sampling.n
                or max(map(len, resume.generated)) > room
                or not all(0 <= token < vocabulary for token in said)
            ):
                return BadRequest("The request can't go on: what it has isn't what it asked for.")
        return None


class _Job:
    """A request, and the tasks that read what vLLM makes of its choices."""

    def __init__(self, engine: VllmEngine, request: GenerateRequest, deliver: Deliver, context_length: int) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.cached_tokens = 0
        self.got_on = False
        """It has a token of this engine."""
        self.place = 0
        self._engine = engine
        self._deliver = deliver
        self._limit = min(request.sampling.max_tokens, context_length - len(request.prompt))
        self._received = time.monotonic() - request.waited
        self._scheduled = self._first = 0.0
        self._tokens = 0 if request.resume is None else request.resume.tokens
        self._living: dict[int, asyncio.Task[None]] = {}
        self._ended = False
        self._late = None if request.timeout is None else loop.call_later(max(0.0, request.timeout - request.waited), self._out_of_time)

    def begin(self, llm: AsyncLLM, place: int) -> None:
        self.place = place
        resume = self.request.resume
        for choice in range(self.request.sampling.n):
            if resume is None or choice not in resume.ended:
                task = asyncio.create_task(self._read(llm, choice), name=f"{self.request.id}-{choice}")
                self._living[choice] = task
        if not self._living:
            asyncio.get_running_loop().call_soon(self.end, None)

    def end(self, error: HeadraceError | None) -> None:
        """Abort what still runs; the error is delivered, or a report of what there was."""
        if self._ended:
            return
        self._ended = True
        if self._late is not None:
            self._late.cancel()
        for task in self._living.values():
            if task is not asyncio.current_task():
                task.cancel()
        self._engine.is_over(self)
        self._deliver([self._report()] if error is None else error)

    async def _read(self, llm: AsyncLLM, choice: int) -> None:
        """One choice, from its first token to its last."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        request, engine = self.request, self._engine
        said = generated(request, choice)
        text = CompletionText(request.sampling, engine.tokenizer, engine.words, choice=choice, limit=self._limit)
        text.replay(said)
        try:
            params = sampling_params(request, choice, limit=self._limit, eos_ids=engine.tokenizer.eos_ids)
            prompt = tokens_input([*request.prompt, *said], cache_salt=str(request.tenant))
            outputs = llm.generate(prompt, params, f"{request.id}-{choice}", priority=self.place)
            index, over = len(said), False
            try:
                async for output in outputs:
                    if self._ended:
                        return
                    index, over = self._take(output, choice, text, index)
                    if over and not output.finished:
                        break
            finally:
                # Tells vLLM to stop, where it has not.
                await outputs.aclose()
            if not over:
                self.end(RequestFailed("vLLM ended the request before it was complete."))
        except EngineDeadError as error:
            engine.core_died(error)
        except VLLMClientError as error:
            self.end(BadRequest(f"vLLM refuses the request: {error}"))
        except Exception as error:
            # An error belongs to one request, whatever it is that vLLM raises.
            if llm.errored:
                engine.core_died(error)
            else:
                logger.error("request %s failed in vLLM", request.id, exc_info=error)
                self.end(
                    RequestFailed(f"vLLM failed on this request ({type(error.__cause__ or error).__name__}); it is in the server's log.")
                )

    def _take(self, output: RequestOutput, choice: int, text: CompletionText, index: int) -> tuple[int, bool]:
        """Deliver what has come of a choice; how many tokens it has now, and whether it is over."""
        events: list[Event] = []
        completion = output.outputs[0]
        if self._limit > 0 and completion.token_ids and not self.got_on:
            self._note_start(output)
        if output.prompt_logprobs:
            events.append(self._scores(output.prompt_logprobs))
        over = False
        if self._limit == 0:
            self._note_start(output)
            events.append(Delta(choice, 0, (), "", "length"))
            over = True
        else:
            positions = completion.logprobs
            for number, token in enumerate(completion.token_ids):
                delta = text.read(picked(token, None if positions is None else positions[number]), index)
                events.append(delta)
                index += 1
                if delta.finish is not None:
                    over = True
                    break
            else:
                if completion.finish_reason == "error":
                    raise RuntimeError("vLLM reports an error of the request")
            made = sum(type(event) is Delta for event in events)
            self._tokens += made
            self._engine.generated(made)
        if over:
            del self._living[choice]
        if events and self._living:
            self._deliver(events)
        elif over:
            self._finish(events)
        return index, over

    def _finish(self, events: list[Event]) -> None:
        """The last choice is over: its events and the report are one delivery."""
        if self._ended:
            return
        deliver = self._deliver
        self._deliver = lambda what: deliver([*events, *what] if not isinstance(what, HeadraceError) else what)
        self.end(None)

    def _note_start(self, output: RequestOutput) -> None:
        self.got_on = True
        self.cached_tokens = min(output.num_cached_tokens or 0, len(self.request.prompt))
        now = self._first = time.monotonic()
        metrics = output.metrics
        self._scheduled = now
        if metrics is not None and metrics.first_token_ts:
            # vLLM's clock is another process's, of the same machine as a rule; only differences are taken.
            self._scheduled = max(self._received, now - (metrics.first_token_ts - metrics.scheduled_ts))
        self._engine.first_token_of(self)

    def _scores(self, positions: Sequence[Any]) -> PromptScores:
        prompt, words = self.request.prompt, self._engine.words
        most = self.request.sampling.prompt_logprobs or 0
        # Where the request goes on, vLLM takes what was generated for the prompt's end.
        scored = zip(prompt[1:], positions[1 : len(prompt)], strict=True)
        return PromptScores((None, *(words.logprob(picked(token, position), most) for token, position in scored)))

    def _report(self) -> Report:
        now = time.monotonic()
        began = self.got_on or self.request.resume is not None
        scheduled, first = (self._scheduled, self._first) if self.got_on else (now, now)
        return Report(
            # A request that never left the queue has cost nothing; one that goes on has left another engine's.
            prompt_tokens=len(self.request.prompt) if began else 0,
            cached_tokens=self.cached_tokens,
            completion_tokens=self._tokens,
            queue_ms=1e3 * (scheduled - self._received),
            prefill_ms=1e3 * (first - scheduled),
            decode_ms=1e3 * (now - first),
        )

    def _out_of_time(self) -> None:
        waited = f"The request took longer than its {self.request.timeout:g} s"
        if not self.got_on:
            self.end(DeadlineExceeded(f"{waited}: it has no token yet."))
        else:
            queue, decode = self._scheduled - self._received, time.monotonic() - self._first
            self.end(DeadlineExceeded(f"{waited}: {queue:.2f} s in the queue, {decode:.2f} s in decode, for {self._tokens} tokens."))


class _Stats:
    """vLLM's `StatLoggerBase`, by its methods: hears of every step."""

    def __init__(self, stepped: Callable[[Any, Any], None]) -> None:
        self._stepped = stepped

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
        self._stepped(scheduler_stats, iteration_stats)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Our own metrics say it."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """It is never put to sleep."""
