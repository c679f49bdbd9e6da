"""The own engine: a thread that steps the model, behind asyncio.

The step thread owns the runner and all state. Requests and cancels reach it through an inbox; events go back to the
event loop with one `call_soon_threadsafe` a step, while the device computes the next. Without requests the thread
sleeps.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from headrace.config import EngineSection
from headrace.engine.capabilities import DRAWS_TOKENS
from headrace.engine.pace import Pace
from headrace.engine.pulse import Pulse
from headrace.engine.stepper import Outbox, Stepper
from headrace.engine.warm_up import warm_up
from headrace.errors import (
    BadRequest,
    ContextLengthExceeded,
    EngineDied,
    EngineUnavailable,
    HeadraceError,
    InvalidParameter,
    ModelError,
)
from headrace.ports import Deliver, HearsOfWarmUp, OnGpus, Overlaps, Runner, StepNotes, Tokenizer
from headrace.types import EngineCard, EngineStats, Event, GenerateRequest, Report, Resume

_PAUSE = 0.01

logger = logging.getLogger(__name__)


class ScheduledEngine:
    """Continuous batching over any `Runner`; a `ports.Engine` that also `ports.Submits`.

    `make_runner` is called on the step thread, the only one that ever touches the runner, and returns it loaded; `make_tokenizer`
    meanwhile, on a thread of its own.
    Should the loop itself break, running requests end with `EngineDied`, `failure` says why and `failed` is set: the
    engine is of no further use then, and its process should exit to be replaced.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        make_tokenizer: Callable[[], Tokenizer],
        *,
        name: str,
        kind: str,
        context_length: int,
        fingerprint: str,
        config: EngineSection,
    ) -> None:
        self.failed = asyncio.Event()
        self.failure: BaseException | None = None
        self.pulse = Pulse()
        self.notes: StepNotes | None = None
        self.pace = Pace()
        self._make_runner = make_runner
        self._make_tokenizer = make_tokenizer
        self._name = name
        self._kind = kind
        self._context_length = context_length
        self._fingerprint = fingerprint
        self._config = config
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._ready: asyncio.Future[EngineCard] | None = None
        self._ended: asyncio.Future[None] | None = None
        self._card: EngineCard | None = None
        self._stepper: Stepper | None = None
        self._gpu_memory: Callable[[], tuple[int, int]] | None = None
        self._finished: Outbox = []
        """What came of the last step, until it is handed over."""
        self._overlaps = False
        self._inbox: deque[tuple[GenerateRequest, Deliver, float] | str] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._known: set[str] = set()

    # --- the event loop's side ---

    async def start(self) -> EngineCard:
        """Load the model and warm up. Raises `ModelError` where that fails."""
        if self._ready is None:
            self._loop = asyncio.get_running_loop()
            self._ready = self._loop.create_future()
            self._ended = self._loop.create_future()
            self._thread = threading.Thread(target=self._live, name=f"steps-{self._name}", daemon=True)
            self._thread.start()
        self._card = await asyncio.shield(self._ready)
        return self._card

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Queue a request; refusals are delivered, too."""
        refusal = self._refusal(request)
        if refusal is not None:
            asyncio.get_running_loop().call_soon(deliver, refusal)
            return
        self._known.add(request.id)
        self._inbox.append((request, self._last_forgets(request.id, deliver), time.monotonic()))
        self.pulse.want()
        self._wake.set()

    def cancel(self, request_id: str) -> None:
        """Free a request's sequences within one step; its `Report` is delivered."""
        if request_id in self._known:
            self._inbox.append(request_id)
            self._wake.set()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[Event]]:
        """Events of one request, a batch at a time; whoever leaves early cancels it."""
        arrived: asyncio.Queue[Sequence[Event] | HeadraceError] = asyncio.Queue()
        ended = False
        self.submit(request, arrived.put_nowait)
        try:
            while not ended:
                batch: list[Event] = []
                error: HeadraceError | None = None
                some = await arrived.get()
                while True:
                    if isinstance(some, HeadraceError):
                        error, ended = some, True
                    else:
                        batch += some
                        ended = isinstance(some[-1], Report)
                    if arrived.empty():
                        break
                    some = arrived.get_nowait()
                if batch:
                    yield batch
                if error is not None:
                    raise error
        finally:
            if not ended:
                self.cancel(request.id)

    def stats(self) -> EngineStats:
        if self._stepper is None:
            return EngineStats()
        stats = self._stepper.stats()
        if self._gpu_memory is not None:
            used, total = self._gpu_memory()
            stats = msgspec.structs.replace(stats, gpu_used=used, gpu_total=total)
        return stats

    def cached_tokens(self, request_id: str) -> int:
        """Of a running request's prompt, those that the prefix cache had."""
        return 0 if self._stepper is None else self._stepper.cached_tokens(request_id)

    async def close(self) -> None:
        """Stop the thread; running requests end with `EngineUnavailable`."""
        if self._ended is None:
            return
        self._closing = True
        self._wake.set()
        await asyncio.shield(self._ended)

    def _refusal(self, request: GenerateRequest) -> HeadraceError | None:
        """Why a request can't be served at all, if so."""
        if self.failed.is_set():
            return EngineDied("The engine died.")
        if self._card is None or self._closing:
            return EngineUnavailable("The engine is not running." if self._card is None else "The engine is stopping.", retry_after=1)
        if request.id in self._known:
            return BadRequest(f"A request with the id {request.id!r} is already running.")
        count, limit = len(request.prompt), self._card.context_length
        if count == 0:
            return InvalidParameter("The prompt is empty.", param="prompt")
        if count > limit - (request.sampling.max_tokens > 0):
            return ContextLengthExceeded(
                f"The prompt has {count} tokens; the model's context holds {limit} tokens, prompt and completion together.", param="prompt"
            )
        if request.resume is not None:
            return self._cannot_resume(request, request.resume)
        if min(request.prompt) < 0 or max(request.prompt) >= self._card.vocab_size:
            return InvalidParameter(f"Token ids go from 0 to {self._card.vocab_size - 1}; the prompt has others.", param="prompt")
        return None

    def _cannot_resume(self, request: GenerateRequest, resume: Resume) -> HeadraceError | None:
        """Why a request that another engine of this kind has begun can't go on here, if so."""
        assert self._card is not None
        room = min(request.sampling.max_tokens, self._card.context_length - len(request.prompt))
        tokens = [token for generated in resume.generated for token in generated]
        if len(resume.generated) != request.sampling.n or max(map(len, resume.generated)) > room:
            return BadRequest("The request can't go on: what it has isn't what it asked for.")
        if (
            min(request.prompt) < 0
            or max(max(request.prompt), max(tokens, default=0)) >= self._card.vocab_size
            or min(tokens, default=0) < 0
        ):
            return BadRequest("The request can't go on: it has tokens that this model doesn't know.")
        return None

    def _last_forgets(self, request_id: str, deliver: Deliver) -> Deliver:
        known = self._known

        def forgetting(events: Sequence[Event] | HeadraceError) -> None:
            if isinstance(events, HeadraceError) or isinstance(events[-1], Report):
                known.discard(request_id)
            deliver(events)

        return forgetting

    def _dispatch(self, outbox: Outbox) -> None:
        loop = asyncio.get_running_loop()
        for deliver, events in outbox:
            try:
                deliver(events)
            except Exception as error:  # noqa: BLE001  one receiver's fault must not cost the others their events
                loop.call_exception_handler({"message": "an engine's events could not be delivered", "exception": error})

    def _started(self, card: EngineCard) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(card)

    def _over(self, error: BaseException | None) -> None:
        """The thread is about to end, of itself or because of an error."""
        while self._inbox:
            entry = self._inbox.popleft()
            if not isinstance(entry, str):
                ending = EngineUnavailable("The engine is stopping.", retry_after=1) if error is None else EngineDied("The engine died.")
                self._dispatch([(entry[1], ending)])
        if self._ready is not None and not self._ready.done():
            refusal = (
                error
                if isinstance(error, HeadraceError)
                else ModelError(f"The model {self._name} could not be loaded: {error or 'it was closed meanwhile'}")
            )
            refusal.__cause__ = error if error is not refusal else None
            self._ready.set_exception(refusal)
        elif error is not None:
            self.failure = error
            self.failed.set()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    # --- the step thread's side ---

    def _live(self) -> None:
        """The step thread, from loading the model to its end."""
        error: BaseException | None = None
        stepper: Stepper | None = None
        try:
            stepper = self._load()
            if not self._closing:
                self._stepper = stepper
                self._post(self._started, self._describe(stepper))
            self._steps(stepper)
        except BaseException as caught:
            error = caught
            if stepper is not None or not isinstance(caught, HeadraceError):  # a refusal to load is for whoever starts us
                logger.error("the step loop of %s broke", self._name, exc_info=caught)
        try:
            if stepper is not None:
                died = error is not None
                stepper.fail_all(lambda: EngineDied("The engine died.") if died else EngineUnavailable("The engine is stopping."))
                self._finished += stepper.outbox
                self._hand_over()
        finally:
            self._post(self._over, error)

    def _load(self) -> Stepper:
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as aside:
            making = aside.submit(self._make_tokenizer)
            runner = self._make_runner()
            tokenizer = making.result()
        self._gpu_memory = runner.gpu_memory if isinstance(runner, OnGpus) else None
        if isinstance(runner, Overlaps):
            runner.meanwhile = self._hand_over
            self._overlaps = True

        def make() -> Stepper:
            return Stepper(
                runner,
                tokenizer,
                context_length=self._context_length,
                max_sequences=self._config.max_sequences,
                step_tokens=self._config.step_tokens,
                prefix_cache=self._config.prefix_cache and getattr(runner, "reuses_prefixes", True),
                deterministic=self._config.deterministic,
                prompt_lookup=self._config.prompt_lookup,
                pace=self.pace,
            )

        warm_up(make())
        if isinstance(runner, HearsOfWarmUp):
            runner.warmed_up()
        stepper = make()
        stepper.pulse = self.pulse
        stepper.notes = self.notes
        return stepper

    def _describe(self, stepper: Stepper) -> EngineCard:
        return EngineCard(
            model=self._name,
            kind=self._kind,
            context_length=stepper.context_length,
            vocab_size=stepper.vocab_size,
            fingerprint=self._fingerprint,
            capabilities=DRAWS_TOKENS,
        )

    def _steps(self, stepper: Stepper) -> None:
        inbox, wake = self._inbox, self._wake
        while not self._closing:
            if stepper.idle and not inbox:
                self._hand_over()
                wake.clear()
                if not inbox and not self._closing:
                    self.pulse.rest()
                    wake.wait()
                continue
            while inbox:
                entry = inbox.popleft()
                if isinstance(entry, str):
                    stepper.cancel(entry)
                else:
                    stepper.add(*entry)
            computed = stepper.step()
            self._finished += stepper.outbox
            stepper.outbox = []
            if not computed or not self._overlaps:
                self._hand_over()
            if not computed and not stepper.idle:
                # Everyone waits and nobody runs: no rule of the scheduler leads here, but a busy loop would hide it.
                wake.wait(_PAUSE)

    def _hand_over(self) -> None:
        """Give the event loop what came of the last step.

        With a runner that overlaps this happens while the device computes the next step: the event loop's work would otherwise
        hold the interpreter when the step thread wants it.
        """
        if self._finished:
            finished, self._finished = self._finished, []
            self._post(self._dispatch, finished)

    def _post(self, function: Callable[..., None], *args: object) -> None:
        """Call on the event loop; nobody is left to hear it where that is closed."""
        if self._loop is not None and not self._loop.is_closed():
            try:
                self._loop.call_soon_threadsafe(function, *args)
            except RuntimeError:
                logger.debug("the event loop was closed before the engine")
