"""The words that every floor shares: what is asked of a model, and what comes back.

Structs that cross the socket between an API process and an engine worker are `msgspec.Struct`s; they are
small, frozen and know no framework. Times are seconds unless a name says milliseconds; counts are tokens
unless a name says bytes.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

FinishReason = Literal["stop", "length", "content_filter", "cancelled", "error"]
"""Why a choice ended: `stop` (end of text or a stop sequence), `length` (max_tokens or the context) or `content_filter`;
`cancelled` and `error` never reach a client as a finish reason, they only reach the log."""


Priority = Literal["sheddable", "default", "critical"]
PRIORITIES: tuple[Priority, ...] = ("sheddable", "default", "critical")
"""From what is refused first to what is refused last."""
PATIENT, PROMPT = 0, 1
"""Requests that came while others kept within the target the wait for a first token, and those that keep within it themselves."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One turn of a conversation, as a chat template sees it."""

    role: str
    content: str
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are drawn. Ranges are checked where the wire is parsed; the engine may rely on them."""

    max_tokens: int
    """Most tokens to generate for each choice, at least 1 (0 is allowed with `prompt_logprobs`)."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    """None: off. k: the chosen token's logprob and those of the k likeliest (0 to 20)."""
    prompt_logprobs: int | None = None
    """None: off. k: score every prompt position in the same way (`echo` with `logprobs`)."""


class Resume(msgspec.Struct, frozen=True, array_like=True):
    """Where a request goes on whose engine died: what its client has of it. All of it counts as said; none of it is said again."""

    generated: tuple[tuple[int, ...], ...]
    """The tokens of each choice."""
    ended: tuple[int, ...] = ()
    """The choices that have ended; there is always one that hasn't."""
    scored: bool = False
    """Whether the prompt's scores, where they were asked for, have arrived."""

    @property
    def tokens(self) -> int:
        """Over all choices."""
        return sum(map(len, self.generated))


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine is asked: token ids in, events out."""

    id: str
    """The request id, unique; it names the request in logs and cancels it."""
    prompt: list[int]
    """Token ids; empty only for an engine with the capability `messages`."""
    sampling: Sampling
    tenant: int = 0
    """Opaque; fairness is between tenants and the prefix cache is salted with it."""
    timeout: float | None = None
    """Seconds from receipt until the request is ended with `DeadlineExceeded`."""
    wanted_within: float | None = None
    """Instead of `timeout`, for a request that others may share: seconds within which whoever came first wants all of it. It decides
    whether the request is let in, and ends nothing."""
    messages: tuple[Message, ...] = ()
    """Only for engines with the capability `messages`, which template by themselves."""
    text: str | None = None
    """Only for engines with the capability `messages`: a completion's prompt as text."""
    priority: Priority = "default"
    """Who is refused first where there is too much to do, and who goes first."""
    rank: int = 3
    """Of those that wait the highest goes first. The worker's admission sets it (`waiting.rank_of`); 3 is `default` and `PROMPT`."""
    waited: float = 0.0
    """Seconds since its receipt, where it was held back before the engine."""
    resume: Resume | None = None
    """Only for engines with the capability `resume`: the request goes on from here. Its events continue where those of the dead
    engine ended, and its `Report` is of the whole request."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """A token with its natural-log probability under the model's own distribution, before temperature and filters."""

    token: int
    logprob: float
    text: str
    """The token's bytes decoded as UTF-8 with replacement; `raw` has the bytes."""
    raw: bytes
    top: tuple[tuple[int, float, str, bytes], ...] = ()
    """The likeliest tokens at this position, likeliest first: (token, logprob, text, raw)."""


class Delta(msgspec.Struct, frozen=True, array_like=True, tag="d", gc=False):
    """New tokens of one choice. Text trails tokens: half a UTF-8 character or a possible stop string is held back."""

    choice: int
    index: int
    """Position, within the choice's completion, of the first of `tokens`."""
    tokens: tuple[int, ...]
    """A remote engine's ids are unknown: -1 stands for each piece of text, and the `Report` corrects the count."""
    text: str
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token that matched, if one did."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens` where logprobs were asked for. Behind a filter they come with their text, which may be a later delta."""


class PromptScores(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """The prompt's logprobs, one entry a prompt token; the first has no predecessor and is None."""

    scores: tuple[TokenLogprob | None, ...]


class Report(msgspec.Struct, frozen=True, array_like=True, tag="r"):
    """The last event of every request that ended without an error: what it cost."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's tokens, those whose keys and values came from the prefix cache."""
    completion_tokens: int
    """Over all choices; tokens held back by a stop string are counted, they were generated."""
    queue_ms: float
    prefill_ms: float
    decode_ms: float


Event = Delta | PromptScores | Report


class EngineCard(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself once it is ready."""

    model: str
    kind: str
    """`openvino`, `echo`, `remote`, …"""
    context_length: int
    """Most tokens of prompt and completion together."""
    vocab_size: int
    fingerprint: str
    """Changes when the weights, the quantization or the engine's numerics do; part of any cache key."""
    capabilities: frozenset[str] = frozenset()
    """Powers not every engine has, by the sampling field or the word that needs them: `logprobs`,
    `prompt_logprobs`, `logit_bias`, `seed`, `n`, `min_p`, `top_k`, `repetition_penalty`, `min_tokens`,
    `ignore_eos`, `stop_token_ids`, `tokens` (accepts token ids), `messages` (templates by itself), `resume` (goes on with what another
    engine has begun)."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the step loop, cheap enough to take once a second."""

    running: int = 0
    """Sequences in the batch."""
    waiting: int = 0
    """Sequences queued."""
    blocks_used: int = 0
    blocks_total: int = 0
    steps: int = 0
    """Steps since the start; it grows while the loop makes progress."""
    step_seconds: float = 0.0
    """Total time spent in steps."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    resumed: int = 0
    """Requests that go on here after another engine's death."""
    predicted_wait: float = 0.0
    """Seconds to the first token of a short request, if it came now; only where a worker's admission says so."""
    refused: int = 0
    """Requests that admission did not let in, or put out again."""
    guessed_tokens: int = 0
    """Computed on the guess that they come next."""
    right_tokens: int = 0
    """Of those, guessed rightly."""
    gpu_used: int = 0
    """Bytes in use on the GPUs that hold the model, by whomever; 0 where there is none."""
    gpu_total: int = 0


EngineState = Literal["absent", "loading", "starting", "ready", "standby", "stopping", "failed"]
"""`absent`: not loaded, and loaded when it is asked for; `loading`: asked for. A model that was ready and isn't any more is `starting`."""


CircuitState = Literal["closed", "half_open", "open"]
"""Of a circuit breaker: all requests go through, a few try the engine, or none."""


DeathCause = Literal["killed", "stalled", "exited"]


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine's worker is in its life, as the supervisor or the worker's client sees it."""

    state: EngineState = "starting"
    reason: str = ""
    """Why it is not ready, for a person."""
    restarts: int = 0
    pid: int = 0
    deaths: dict[DeathCause, int] = {}
    """How often it was replaced, why: killed by a signal (the system's, when memory is out, among them), stalled, or exited by itself."""


class StoredTensor(NamedTuple):
    """A tensor as a weights file's header lists it."""

    name: str
    dtype: str
    """As safetensors writes it: `BF16`, `F32`, `I8`, …"""
    shape: tuple[int, ...]
    size: int
    """Bytes in the file."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class ModelFiles(msgspec.Struct, frozen=True, kw_only=True):
    """A model ready to be loaded: everything about it is on this machine, or behind `url`."""

    name: str
    kind: Literal["openvino", "transformers", "vllm", "echo", "remote"]
    aliases: tuple[str, ...] = ()
    folder: str = ""
    """For `openvino`: holds `openvino_model.xml` and `.bin`, `tokenizer.json`, and what the template needs. For `transformers`: the same
    beside `config.json` and `*.safetensors`, or beside a GGUF file. For `vllm`: beside `config.json` and `*.safetensors`."""
    url: str = ""
    """For `remote`: the base URL, ending in `/v1` as a rule."""
    options: dict[str, str] = {}
    """For `echo` and `remote`: what the model's address said after `?`."""
    context_length: int = 0
    """Most tokens of prompt and completion together; 0 where only the engine knows (`remote`)."""
    fingerprint: str = ""
    """Hash over the weights; two models with the same fingerprint give the same distributions."""
    notes: tuple[str, ...] = ()
    """Lines to say at start, such as that this is a small demonstration model."""
    pending: bool = False
    """It is not on this machine yet, and nothing but its names is known."""
    versioned: bool = False
    """It is one of several versions, so that an alias may stand for another one soon."""

    @property
    def public_name(self) -> str:
        """The name that answers, figures and lists carry: the operator's alias if there is one that is always this model's."""
        return self.aliases[0] if self.aliases and not self.versioned else self.name


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


BudgetPeriod = Literal["day", "month", "total"]


class LimitSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a key or a tenant may use; None is no limit."""

    rpm: int | None = None
    """Requests a minute: a token bucket whose burst is the limit."""
    tpm: int | None = None
    """Prompt and completion tokens a minute, likewise."""
    concurrency: int | None = None
    budget_tokens: int | None = None
    budget_period: BudgetPeriod = "month"


Scope = Literal["inference", "usage", "admin"]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An API key as it is stored: everything but the secret."""

    id: str
    """`key_…`, random."""
    name: str
    prefix: str
    """The first characters of the secret, for people to recognise it."""
    digest: bytes
    """HMAC-SHA-256 of the secret under the server's pepper."""
    tenant: str
    models: tuple[str, ...] = ()
    """Names it may use; empty is all."""
    scopes: frozenset[Scope] = frozenset({"inference"})
    limits: LimitSpec = LimitSpec()
    created_at: float = 0.0
    """Unix time, like the others."""
    created_by: str = ""
    expires_at: float | None = None
    revoked_at: float | None = None
    all_tenants: bool = False
    """With scope `admin`: administers every tenant, not only its own."""
    priority: Priority = "default"
    """The highest that its requests may have; those that ask for more get this."""


class TenantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A group of keys, with limits over all of them."""

    name: str
    limits: LimitSpec = LimitSpec()
    created_at: float = 0.0


class KnownKey(msgspec.Struct, frozen=True):
    """A key with the tenant it belongs to."""

    key: KeyRecord
    tenant: TenantRecord


class KeyChanges(msgspec.Struct, frozen=True):
    """What has changed since a version."""

    version: int
    """The newest; every change raises it."""
    keys: frozenset[str] = frozenset()
    """Ids of keys made, revoked or rotated."""
    tenants: frozenset[str] = frozenset()
    """Names of tenants made or changed."""


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Who did what to which key or tenant."""

    at: float
    """Unix time."""
    actor: str
    """A key's id, or `cli:` and the name of the machine's user."""
    action: str
    """`key.create`, `key.revoke`, `key.rotate`, `tenant.create`, `tenant.change`"""
    subject: str
    """The key's id or the tenant's name."""
    tenant: str
    details: dict[str, Any] = {}
    id: int = 0
    """Rising; given by the store."""


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who a request comes from."""

    number: int
    """The tenant as an opaque number, for fairness and for keeping caches apart."""
    key: KeyRecord | None = None
    """None for an anonymous caller."""
    tenant: TenantRecord | None = None


# Bills


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request on the bill: opened before an engine is asked, settled when it is over."""

    id: str
    """The request's id, unique."""
    opened_at: float
    """Unix time, like `settled_at`. The day that it is billed on is this one's, in UTC."""
    tenant: str
    model: str
    key: str = ""
    """The key's id; empty for an anonymous caller."""
    choices: int = 1
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt's tokens."""
    completion_tokens: int = 0
    """Over all choices."""
    finish: str = ""
    """Why the (last) choice ended; empty where it didn't."""
    status: str = "open"
    """`open`; then `ok`, `cancelled` (the client hung up), `cached`, `interrupted` (its API process died), or the code of the error
    that ended it."""
    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    settled_at: float | None = None
    price: int | None = None
    """In 10⁻¹² of the currency's unit, exact; None where the model has no price."""
    currency: str = ""
    writer: str = ""
    """The API process that answers for the row, by the name of its folder in the journal."""


UsageGroup = Literal["key", "tenant", "model", "day"]
USAGE_GROUPS: tuple[UsageGroup, ...] = ("key", "tenant", "model", "day")


class UsageQuery(msgspec.Struct, frozen=True, kw_only=True):
    """Which settled rows to add up, and by what."""

    group_by: tuple[UsageGroup, ...] = ()
    since: float | None = None
    """Unix time of opening, inclusive."""
    until: float | None = None
    """Exclusive."""
    key: str | None = None
    tenant: str | None = None
    model: str | None = None


class UsageLine(msgspec.Struct, frozen=True, kw_only=True):
    """The sum over a group of rows, all in one currency."""

    group: dict[UsageGroup, str]
    """What the rows have in common; a day is `2026-11-21`."""
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    price: Decimal | None
    """None where no row has one."""
    currency: str


class TrackedError(msgspec.Struct, frozen=True, kw_only=True):
    """Errors that are alike, counted. It never holds what users wrote, and no keys."""

    fingerprint: str
    """The same for errors of the same kind at the same place."""
    process: str
    """`api`, `engine`, `supervisor`; of a process that died its name among the children."""
    code: str
    """The error's code; of an error outside of requests what the log says, which is a constant text."""
    kind: str = ""
    """The exception's class, with that of its cause."""
    route: str = ""
    model: str = ""
    frames: tuple[str, ...] = ()
    """Where in our own code it was raised, innermost last: `headrace.module:Class.method:line`."""
    detail: str = ""
    """Further words of ours, such as how a process ended."""
    count: int = 1
    first_seen: float
    """Unix time, like `last_seen`."""
    last_seen: float
    request_id: str = ""
    """Of the last request that met it; empty outside of requests."""
    version: str = ""
    """Of Headrace, when it was last seen."""


class CacheTags(msgspec.Struct, frozen=True):
    """Whose a cached answer is; what it can be purged by."""

    tenant: str
    model: str
    key: str = ""
    """The id of the key whose request made it; empty for an anonymous caller."""


class CacheSize(msgspec.Struct, frozen=True):
    entries: int
    bytes: int | None
    """None where the store doesn't say."""


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
