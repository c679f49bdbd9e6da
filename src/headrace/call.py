"""One request on its journey, and what became of it. The HTTP floor makes it from the wire; the steps of the journey read and fill it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from headrace.records import KeyRecord, TenantRecord
from headrace.types import Delta, Event, FinishReason, GenerateRequest, Message, Priority, Report, Sampling, TokenLogprob

ServedFrom = Literal["engine", "cache", "shared"]


@dataclass(slots=True)
class Outcome:
    """What became of a call. Steps read it when they leave."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: FinishReason | None = None
    first_token_at: float | None = None
    """`time.monotonic()` when the first token left the engine client."""
    report: Report | None = None
    error: BaseException | None = None

    served_from: ServedFrom = "engine"
    """`cache`: a stored answer. `shared`: an identical request's generation; this call may have taken over its bill on the way."""
    cache_level: str = ""
    """Which level of the cache had the answer, for counting: `memory`, `sqlite`, `redis`; empty otherwise."""
    own_prompt_tokens: int | None = None
    """Of the prompt's tokens, those this call pays in full; None is all. The rest costs `cached_price`."""
    own_completion_tokens: int | None = None
    """Likewise of the completion's. It grows as they are generated, which may be before they are read: a call that leaves pays for
    what was generated until then."""
    cached_price: float = 0.0
    """Fraction of a token that a token costs which is not this call's own."""
    engine_request: str = ""
    """The id under which the engine runs a shared generation: that of the call that began it."""
    others_go_on: bool = False
    """Others were listening to the shared generation when this call left it."""

    @property
    def billed_prompt_tokens(self) -> int:
        return self._billed(self.prompt_tokens, self.own_prompt_tokens)

    @property
    def billed_completion_tokens(self) -> int:
        """Of a call that is not shared, those that passed (`note`)."""
        return self._billed(self.completion_tokens, self.own_completion_tokens)

    def _billed(self, tokens: int, own: int | None) -> int:
        if own is None:
            return tokens
        return own + int(self.cached_price * max(0, tokens - own) + 0.5)

    def note(self, batch: list[Event]) -> None:
        """Count what passes, as it passes: a client that hangs up is billed for what it was sent."""
        for event in batch:
            if type(event) is Delta:
                if event.tokens and self.first_token_at is None:
                    self.first_token_at = time.monotonic()
                self.completion_tokens += len(event.tokens)
                if event.finish is not None:
                    self.finish = event.finish
            elif type(event) is Report:
                self.report = event
                self.prompt_tokens = event.prompt_tokens
                self.cached_tokens = event.cached_tokens
                self.completion_tokens = event.completion_tokens


class Repeats(Protocol):
    """Cleans a prompt that an answer repeats."""

    def __call__(self, call: Call, text: str, tokens: Sequence[TokenLogprob]) -> tuple[str, Sequence[TokenLogprob], bool]:
        """What may be shown of it, and of its tokens (all of them, or none); whether the answer ends there."""
        ...


Transform = Callable[[list[Event]], list[Event]]
Tap = Callable[[list[Event]], None]


class Sink(Protocol):
    """Whoever reads a call's events, where they may be put into its hands instead: a token then wakes no task."""

    def ready(self) -> bool:
        """Whether it can take a batch now, which must not overtake one that was read. If not, it is to be read."""
        ...

    def put(self, batch: list[Event]) -> None:
        """A batch, at once and without waiting for anything. What it raises ends the call."""
        ...


Share = Callable[[AsyncIterator[list[Event]]], AsyncIterator[list[Event]]]


ANONYMOUS = "anonymous"
"""The tenant's name of callers without a key."""


@dataclass(slots=True)
class Call:
    """One request on its journey: what was asked, who asked, and what became of it.

    The HTTP floor makes it from the wire; steps fill in the rest. One of `messages`, `text` and `tokens` is set.
    """

    id: str
    route: str
    """The matched route's path, such as `/v1/chat/completions`."""
    model: str | None
    """The name asked for; None is the default model."""
    sampling: Sampling
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    tokens: list[int] | None = None
    stream: bool = False
    token: str | None = None
    """The bearer token as sent, never logged."""
    address: str = ""
    """The client's address, after trusted proxies."""
    key_required: bool = False
    timeout: float | None = None
    """Seconds that the caller gives it, from `started_at`; None leaves it to the server."""
    priority: Priority = "default"
    """As asked for, and from when the caller is known no higher than it may be."""
    started_at: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    """`time.monotonic()` when its time is over, by the caller's limit or the server's; the step that prepares it sets this."""

    tenant: int = 0
    key: str | None = None
    """A short public name of the key, for the log."""
    caller: KeyRecord | None = None
    """The key; None for an anonymous caller."""
    caller_tenant: TenantRecord | None = None
    """The key's tenant, with its limits; None for an anonymous caller."""
    subject_tenant: str = ANONYMOUS
    """The tenant's name, for the bill."""
    identified: bool = False
    """The HTTP floor has found out already who calls."""
    request: GenerateRequest | None = None
    served_model: str | None = None
    source: AsyncIterator[list[Event]] | None = None
    """Where events come from; the step that opens it sets it (a cache, or the engine)."""
    transforms: list[Transform] = field(default_factory=list)
    ended: bool = False
    """A transform sets it where nothing more may be said; the journey then closes the source."""
    notes: dict[str, str] = field(default_factory=dict)
    """What callers are told of the journey: headers of non-streaming answers, comments at the end of streams."""
    filtered: list[tuple[str, str, str]] = field(default_factory=list)
    """What filters decided, in order: stage, kind of match, action; for the metrics."""
    retried: tuple[str, ...] = ()
    """Models whose engine was asked again, once for each time; for the metrics."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of the answer, whether it is streamed, whole or a refusal; names in lower case."""
    late_headers: Callable[[], dict[str, str]] | None = None
    """Further ones, which are worked out when the answer begins."""
    counted: bool = False
    """It was taken from its caller's limits as a request."""
    headers_sent: bool = False
    """The answer has begun, so that nobody would see what is set now."""
    cache: bool | None = None
    """Whether the caller wants the response cache; None leaves it to the server."""
    cache_control: str = ""
    """The request's Cache-Control header."""
    asked: tuple[str, str] | None = None
    """Where `model` was found by an alias, or by a name without a version: that name, and the model that was chosen for it."""
    shadow: str = ""
    """A model that is to get a copy of the request, for its answer to be compared."""
    storable: bool = True
    """A step sets it False where the answer must not be kept: degraded, from a fallback, or cut short."""
    others_left: bool = False
    """A fallback can answer, so an engine that isn't ready isn't waited for."""
    share: Share | None = None
    """Set by the cache: the journey hands it the source, and reads what it gives instead."""
    repeats: Repeats | None = None
    """Set by the output filter: how a prompt that is told again in the answer may be shown."""
    taps: list[Tap] = field(default_factory=list)
    """See each batch as it leaves, after the transforms."""
    sink: Sink | None = None
    """Set by whoever reads the events, after the first of them."""
    outcome: Outcome = field(default_factory=Outcome)

    def seconds_left(self) -> float | None:
        """Until the deadline, at least a millisecond; None without one. Rounded, because errors tell it to people."""
        if self.deadline is None:
            return None
        left = self.deadline - time.monotonic()
        return round(left, 2) if left >= 1 else max(0.001, round(left, 4))
