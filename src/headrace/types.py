"""The words that every floor shares: what is asked of an engine, and what comes back.

Structs that cross the socket between an API process and an engine worker are `msgspec.Struct`s; they are
small, frozen and know no framework. Times are seconds unless a name says milliseconds; counts are tokens
unless a name says bytes.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

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
