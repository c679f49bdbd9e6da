"""A request inside the engine, and its sequences: tokens, blocks, and how far the model has read them."""

from __future__ import annotations

import math
import os
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headrace.ports import Deliver
from headrace.types import Event, GenerateRequest, TokenLogprob

if TYPE_CHECKING:
    from headrace.engine.completion import Completion
    from headrace.engine.lookup import Lookup


class State(IntEnum):
    """Where a sequence is. A preempted one is `WAITING` again."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    DONE = 3


class Job:
    """A request in the engine, from receipt to its last event."""

    __slots__ = (
        "cached_tokens",
        "charged",
        "completion_tokens",
        "deadline",
        "deliver",
        "ended",
        "events",
        "first_token_at",
        "forked",
        "limit",
        "order",
        "prompt",
        "received_at",
        "request",
        "resume",
        "scores",
        "scores_said",
        "seed",
        "sequences",
        "started_at",
    )

    def __init__(self, request: GenerateRequest, deliver: Deliver, *, order: int, received_at: float, context_length: int) -> None:
        self.request = request
        self.deliver = deliver
        self.order = order
        """Rank of arrival."""
        self.received_at = received_at
        self.deadline = math.inf if request.timeout is None else received_at + request.timeout
        self.prompt = np.array(request.prompt, dtype=np.int64)
        self.resume = request.resume
        self.limit = min(len(self.prompt) + request.sampling.max_tokens, context_length)
        """Tokens of prompt and completion at which a choice ends with `length`."""
        self.started_at: float | None = None
        """When the first of its tokens went into a step."""
        self.first_token_at: float | None = None
        self.cached_tokens = 0
        self.completion_tokens = 0 if self.resume is None else self.resume.tokens
        self.charged = 0
        """Prompt tokens that the tenant has been charged for."""
        self.seed = int.from_bytes(os.urandom(8), "little") >> 1
        """Of a request that brings none."""
        self.forked = request.sampling.n == 1 or self.resume is not None
        """Whether the choices beyond the first exist yet; they begin where the prompt ends."""
        self.scores: list[TokenLogprob | None] = [None]
        """Of prompt positions, where they were asked for."""
        self.scores_said = self.resume is not None and self.resume.scored
        if self.scores_said:
            self.scores *= len(self.prompt)
        self.sequences: list[Sequence] = []
        """Those not done yet."""
        self.events: list[Event] = []
        """Made in this step, not handed over yet."""
        self.ended = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def tenant(self) -> int:
        return self.request.tenant

    @property
    def choices(self) -> list[int]:
        """Those that begin with the request."""
        if self.resume is None:
            return [0]
        return [choice for choice in range(self.request.sampling.n) if choice not in self.resume.ended]

    def generated(self, choice: int) -> tuple[int, ...]:
        """The tokens with which a choice begins."""
        return () if self.resume is None else self.resume.generated[choice]

    @property
    def scored(self) -> bool:
        """Whether every prompt position is scored, which makes the cache's blocks useless for reading."""
        return self.request.sampling.prompt_logprobs is not None

    def phases(self, now: float) -> tuple[float, float, float]:
        """Milliseconds in the queue, in prefill, and decoding, up to now."""
        started = now if self.started_at is None else self.started_at
        first = now if self.first_token_at is None else self.first_token_at
        return (started - self.received_at) * 1e3, (first - started) * 1e3, (now - first) * 1e3


class Sequence:
    """One choice of a request: its tokens, and the blocks that hold their keys and values."""

    __slots__ = (
        "blocks",
        "choice",
        "completion",
        "computed",
        "job",
        "keys",
        "length",
        "lookup",
        "promised",
        "prompt_length",
        "root",
        "state",
        "tokens",
    )

    def __init__(self, job: Job, choice: int, root: bytes) -> None:
        self.job = job
        self.choice = choice
        self.root = root
        """The tenant's salt: what the chain of block keys begins with."""
        self.prompt_length = len(job.prompt)
        generated = job.generated(choice)
        self.tokens: NDArray[np.int64] = np.concatenate([job.prompt, np.array(generated, np.int64)]) if generated else job.prompt
        """Prompt and completion; only the first `length` entries count."""
        self.length = len(self.tokens)
        self.computed = 0
        """Tokens whose keys and values are in the blocks."""
        self.blocks = BlockTable()
        self.keys: list[bytes] = []
        """The key of each full block of tokens, as far as they were needed."""
        self.promised: list[bytes] = []
        """Keys of blocks that this sequence is about to compute."""
        self.state = State.WAITING
        self.completion: Completion | None = None
        self.lookup: Lookup | None = None
        """Made when its next tokens are first guessed."""

    @property
    def generated(self) -> int:
        return self.length - self.prompt_length

    def append(self, token: int) -> None:
        length = self.length
        if length == len(self.tokens):
            wider = np.empty(min(max(2 * length, 64), max(self.job.limit, length + 1)), np.int64)
            wider[:length] = self.tokens
            self.tokens = wider
        self.tokens[length] = token
        self.length = length + 1


class BlockTable:
    """A sequence's physical blocks in order, as an array that grows in place."""

    __slots__ = ("_array", "count")

    def __init__(self) -> None:
        self._array = np.empty(16, np.int32)
        self.count = 0

    @property
    def array(self) -> NDArray[np.int32]:
        """A view, good until the table next grows."""
        return self._array[: self.count]

    def append(self, block: int) -> None:
        if self.count == len(self._array):
            self._array = np.concatenate([self._array, np.empty(self.count, np.int32)])
        self._array[self.count] = block
        self.count += 1

    def __getitem__(self, index: int) -> int:
        return int(self._array[index])

    def clear(self) -> list[int]:
        """Forget all blocks; returns them, for the caller to release."""
        blocks: list[int] = self.array.tolist()
        self.count = 0
        return blocks
