"""The seams. Each is a protocol of two to four methods; what is behind one is chosen at start and passed in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeGuard, runtime_checkable

from headrace.call import Call
from headrace.claims import Claim, Extended, Refused, Room, Take, Taken
from headrace.errors import HeadraceError
from headrace.records import (
    AuditEntry,
    CacheSize,
    CacheTags,
    KeyChanges,
    KeyRecord,
    KnownKey,
    TenantRecord,
    TrackedError,
    UsageLine,
    UsageQuery,
    UsageRow,
)
from headrace.types import EngineCard, EngineStats, Event, GenerateRequest, Message, Report

if TYPE_CHECKING:  # annotations are all that needs it here
    import numpy as np
    from numpy.typing import NDArray


class Engine(Protocol):
    """Something that turns a prompt into tokens: our own scheduler, echo, a remote URL, or the client of a worker."""

    async def start(self) -> EngineCard:
        """Load and warm up; returns once requests can be served. Raises `ModelError`."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[list[Event]]:
        """Events of one request, in order, a batch at a time; a `Report` is the last.

        Closing the iterator (`aclose`, or cancelling its task) frees the request's sequences within two steps.
        Raises `HeadraceError`s: refusals before the first batch, failures at any time.
        """
        ...

    def stats(self) -> EngineStats:
        """A snapshot of the loop; never blocks."""
        ...

    async def close(self) -> None:
        """End what runs and free everything. Idempotent."""
        ...


TakesBatch = Callable[[list[Event]], bool]
"""Takes a batch the moment it is there. False: not now, it is to be read instead. Raises nothing."""


class HandsOver(Protocol):
    """A source of events that can hand a batch over the moment it is there, while its reader waits for one."""

    def hand_to(self, take: TakesBatch) -> None:
        """From now on `take` is asked first; what it doesn't take is read, and so is the last batch, that with the `Report`."""
        ...

    def stop(self, error: Exception | None = None) -> None:
        """Whoever reads is to go no further: it gets the error, or the end. From within `take`, for what came of it."""
        ...


def hands_over(source: object) -> TypeGuard[HandsOver]:
    """Whether it is one; `isinstance` of a protocol takes Python longer than a token's whole way."""
    return hasattr(source, "hand_to")


Deliver = Callable[[Sequence[Event] | HeadraceError], None]
"""Receives a request's events, or the error that ended it. Called on the event loop's thread."""


@runtime_checkable
class Submits(Protocol):
    """An engine that can push events without a task per request; a worker prefers it to `generate`."""

    def submit(self, request: GenerateRequest, deliver: Deliver) -> None:
        """Queue a request. Exactly one `Report` or error is delivered last, also after a cancel (then `Report`)."""
        ...

    def cancel(self, request_id: str) -> None:
        """Free the request's sequences within one step; unknown ids are ignored."""
        ...


class TokenStream(Protocol):
    """Incremental detokenization of one sequence; never emits half a UTF-8 character."""

    def push(self, token: int) -> str:
        """The text that became certain with this token; often empty in the middle of a character."""
        ...

    def flush(self) -> str:
        """What is left at the end; incomplete bytes become U+FFFD."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back. Text from outside never becomes control tokens."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_ids(self) -> tuple[int, ...]:
        """What the model wants before a plain completion's prompt; often nothing."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        ...

    def encode(self, text: str, *, limit: int | None = None) -> list[int]:
        """Plain text only: `<|im_start|>` stays the characters that were typed. No BOS is added. Releases the GIL.

        Raises `TooManyTokens` as soon as it is certain that there are more than `limit` tokens.
        """
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Raises `InvalidParameter` for ids outside the vocabulary. Control tokens are shown by name."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds in the middle of a text; a control token's are its name's."""
        ...

    def stream(self) -> TokenStream:
        """A new incremental detokenizer, for a completion that starts in the middle of a text. Control tokens emit nothing."""
        ...


class ChatTemplate(Protocol):
    """A model's chat template, which makes a prompt from a conversation."""

    def encode(self, messages: Sequence[Message], *, limit: int | None = None) -> list[int]:
        """The prompt's token ids, ready for the assistant's turn. `limit` is as in `Tokenizer.encode`.

        Only the template's own control tokens become control tokens. Raises `BadRequest` where the template refuses the
        conversation (a role it doesn't know, a wrong order) or runs into its time limit.
        """
        ...


@dataclass(slots=True)
class ForwardBatch:
    """One call of the model over paged KV blocks: prompt chunks and single-token decodes mixed.

    Shapes: T tokens over all sequences, S sequences, R rows whose next-token distribution is wanted.
    """

    input_ids: NDArray[np.int64]
    """[T]"""
    position_ids: NDArray[np.int64]
    """[T]"""
    past_lens: NDArray[np.int32]
    """[S] tokens of each sequence already in its blocks."""
    subsequence_begins: NDArray[np.int32]
    """[S+1] where each sequence's tokens begin in `input_ids`."""
    block_indices: NDArray[np.int32]
    """Physical blocks of all sequences, concatenated. A sequence may have more than its tokens need, where the runner `Rewinds`."""
    block_indices_begins: NDArray[np.int32]
    """[S+1]"""
    max_context_len: int
    """Longest past + new over the sequences."""
    rows: NDArray[np.int64]
    """[R] indices into the T tokens."""
    best_only: bool = False
    """True where nothing but each row's likeliest token will be asked for: a runner may leave the rest out of its result, with `logsumexp`
    any finite number where the likeliest logit is finite."""


class ForwardResult(Protocol):
    """Next-token distributions of the R rows; valid until the next `forward`."""

    @property
    def top_ids(self) -> NDArray[np.int64]:
        """[R, k] the likeliest tokens, likeliest first; k may be 1 for a batch with `best_only`."""
        ...

    @property
    def top_logits(self) -> NDArray[np.float32]:
        """[R, k]"""
        ...

    @property
    def logsumexp(self) -> NDArray[np.float32]:
        """[R] over the whole vocabulary."""
        ...

    def logits(self, row: int) -> NDArray[np.float32]:
        """[vocabulary] all logits of one of the R rows; a fresh copy."""
        ...


class Runner(Protocol):
    """A model on a device, under our own scheduler. Called from one thread only."""

    @property
    def block_size(self) -> int:
        """Tokens a KV block holds."""
        ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def forward(self, batch: ForwardBatch) -> ForwardResult:
        """Run one step. Raises `RequestFailed` where the batch itself is at fault."""
        ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (source, destination) in every layer, for sequences that part ways within a block."""
        ...


class Keys(Protocol):
    """API keys by their digest, as requests need them. Raises `StoreUnavailable`."""

    async def find(self, digest: bytes) -> KnownKey | None:
        """The key with this digest, also when it is expired or revoked. One found by a rotated secret expires with that secret."""
        ...

    async def changes(self, since: int) -> KeyChanges:
        """What has changed after version `since`; 0 asks for the version alone."""
        ...


class KeyRegister(Keys, Protocol):
    """Keys and tenants, as administrators need them. A change and its audit entry are one transaction. Raises `StoreUnavailable`."""

    async def keys(self, tenant: str | None = None) -> list[KeyRecord]:
        """All keys, or a tenant's, oldest first."""
        ...

    async def key(self, key_id: str) -> KeyRecord | None: ...

    async def add(self, record: KeyRecord, entry: AuditEntry) -> None:
        """Keep a new key; its tenant is made if it isn't there."""
        ...

    async def revoke(self, key_id: str, at: float, entry: AuditEntry) -> bool:
        """End a key and its older secrets. False if it isn't there or was revoked before; then nothing is noted."""
        ...

    async def rotate(self, key_id: str, prefix: str, digest: bytes, old_ends_at: float, entry: AuditEntry) -> bool:
        """Give a key another secret; the old one works until `old_ends_at`. False if there is no such key, or it is revoked."""
        ...

    async def tenants(self) -> list[TenantRecord]: ...

    async def put_tenant(self, record: TenantRecord, entry: AuditEntry) -> None:
        """Make a tenant, or change its limits."""
        ...

    async def agree_on_pepper(self, check: bytes) -> bool:
        """Whether `check`, which comes from the pepper at hand, is the one that came first."""
        ...


class Audit(Protocol):
    """The audit log. It only grows: there is no way to change or remove an entry."""

    async def note(self, entry: AuditEntry) -> None:
        """Add an entry that belongs to no change of keys or tenants."""
        ...

    async def entries(self, *, since: float = 0.0, tenant: str | None = None, limit: int = 1000) -> list[AuditEntry]:
        """The newest entries, at most `limit`, oldest first."""
        ...


class Ledger(Protocol):
    """The bill: one row a request. Raises `StoreUnavailable`."""

    async def write(self, opened: Sequence[UsageRow], settled: Sequence[UsageRow]) -> None:
        """Make rows durable, all in one commit. Doing it again, or in another order, changes nothing: a row is settled once."""
        ...

    async def open_rows(self, writer: str) -> list[UsageRow]:
        """What an API process opened and has not settled."""
        ...

    async def settled_rows(self, writer: str, since: float) -> list[UsageRow]:
        """What an API process has settled since then (Unix time), of what was opened a day before at most."""
        ...

    async def usage(self, query: UsageQuery) -> list[UsageLine]:
        """Sums over settled rows, a line for each group and currency, in the order of the groups."""
        ...

    async def used(self, subject: Literal["key", "tenant"], name: str, since: float) -> int:
        """Prompt and completion tokens of settled rows that were opened since then (Unix time)."""
        ...


class Books(Protocol):
    """One API process's hand in the ledger, as the journey sees it."""

    async def open(self, row: UsageRow) -> None:
        """Returns once the row is durable. Raises `StoreUnavailable` if it can't be made so, and `Overloaded`."""
        ...

    def close(self, row: UsageRow, shared_with: str = "", *, more: bool = False) -> None:
        """The request is over for its caller: settle it as soon as no engine works on it any more. Never waits.

        If an engine counted, the counts and times are the engine's; else they are the row's own. `shared_with` is the request that an
        engine was asked for, where several share one generation: then the counts are each row's own, and the last row to be closed has what
        the engine made beyond what any of them saw. `more`: others go on with that generation, and pay for what is still to come.
        """
        ...


class Meters(Protocol):
    """Where engines of other processes count a request's tokens, as the client of an engine sees it.

    A request that is on no bill has the slot -1.
    """

    @property
    def path(self) -> str:
        """The file that the engine's process shares."""
        ...

    def begin(self, request_id: str) -> int:
        """The slot to count in; the request is about to be handed to an engine. To be followed by one `ended`."""
        ...

    def restart(self, request_id: str, delivered: int) -> int:
        """Its engine died; the next one goes on after the first `delivered` tokens of completion, and what was made beyond them is
        not billed twice. How many tokens of the prompt the engine that it began with had cached, as far as that is on the bill."""
        ...

    def has_ended(self, request_id: str) -> bool:
        """Whether the engine's process itself has noted that nothing more comes."""
        ...

    def ended(self, request_id: str, report: Report | None, seen: int | None = None) -> None:
        """No engine counts for it any more. `seen`: tokens of completion that were read, where not all of them were."""
        ...


class Counter(Protocol):
    """Where an engine's process notes what one request has cost so far; what is noted survives the death of any process."""

    def prompt(self, tokens: int, cached: int) -> None:
        """The engine has begun with the prompt."""
        ...

    def add(self, tokens: int) -> None:
        """More tokens of completion, which are about to be delivered."""
        ...

    def end(self, report: Report | None) -> None:
        """Nothing more comes. The report, if there is one, has the last word on the counts."""
        ...


class Counters(Protocol):
    """The counters of one API process's requests, in a file that it shares."""

    def counter(self, slot: int) -> Counter: ...

    def close(self) -> None:
        """No counter of these is used any more."""
        ...


class StepNotes(Protocol):
    """Where an engine's process notes whom its death would make suspect; what is noted survives it."""

    def step(self, request_ids: Sequence[str], spans: Sequence[tuple[int, int]] = ()) -> None:
        """A step begins with these requests that this engine has not made a token for yet. Called only when there are some, or were.
        `spans`, where they are known: how many tokens of each were computed before, and will be after."""
        ...

    def alone(self, request_id: str) -> None:
        """This request has the engine to itself from now on; empty: nobody has."""
        ...


@runtime_checkable
class NotesSteps(Protocol):
    """An engine that notes, before each step, who takes part in it without having got a token from it."""

    notes: StepNotes | None


@runtime_checkable
class TellsCached(Protocol):
    """An engine that knows how much of a prompt its prefix cache had before the request's `Report` says so."""

    def cached_tokens(self, request_id: str) -> int: ...


class Limits(Protocol):
    """Rates, concurrency and budgets, over all processes that share them. The rules are in docs/limits.md."""

    def peek(self, claims: Sequence[Claim]) -> tuple[Refused | None, tuple[Room, ...]]:
        """Whether a request would certainly be refused, and how its claims stand at best, by what this process knows. Never waits."""
        ...

    async def take(self, take: Take) -> Taken | Refused:
        """Admit a request for all its claims, or for none. An admitted one is to be settled. Raises `StoreUnavailable`."""
        ...

    def extend(self, id: str, tokens: int, told: Callable[[Extended], None]) -> None:
        """Lease more output to an admitted request; `told` hears what was granted, later. Never waits."""
        ...

    async def charge(self, id: str, claims: tuple[Claim, ...], requests: int) -> tuple[Room, ...] | None:
        """Count so many requests that come to nothing, without a lease and whatever is left; how the claims stand then, where that is
        known. `id` makes it count once."""
        ...

    async def settle(self, id: str, used: int, *, guessed: bool = False, wait: bool = True) -> tuple[Room, ...] | None:
        """The request is over and used so many tokens; how its claims stand now, where that is known. Unknown ids are ignored.

        `guessed`: nobody here knows yet how much it was, and this is the most. Without `wait` it is only sent, and nothing is told.
        """
        ...


class Cache(Protocol):
    """Values under keys for a limited time. Raises `StoreUnavailable`."""

    async def get(self, key: bytes) -> bytes | None:
        """None where there is nothing, or nothing any more."""
        ...

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        """Keep a value for `ttl` seconds, in place of an older one. A value too large for the store is not kept."""
        ...

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        """Drop what has all of the given tags, or everything; the number of values dropped."""
        ...

    async def close(self) -> None:
        """Let go of files and connections. Idempotent."""
        ...


@runtime_checkable
class PutsMany(Protocol):
    """A cache that takes many values in one go. Raises `StoreUnavailable`."""

    async def put_many(self, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
        """As `Cache.put`, for each key with its value and tags."""
        ...


@runtime_checkable
class Sized(Protocol):
    """A cache that knows how full it is. Raises `StoreUnavailable`."""

    async def size(self) -> CacheSize: ...


class ErrorBook(Protocol):
    """Errors by fingerprint, the newest of them. Raises `StoreUnavailable`."""

    async def add(self, errors: Sequence[TrackedError]) -> None:
        """Count these with what is there already; beyond its size the book forgets those that weren't seen for longest."""
        ...

    async def newest(self, *, limit: int = 20, since: float = 0.0) -> list[TrackedError]:
        """Those seen since then (Unix time), last seen first."""
        ...


class Answers(Protocol):
    """The levels of the response cache, as the journey sees them. Nothing here fails or waits long: a broken level has nothing."""

    def recall(self, key: bytes) -> bytes | None:
        """What this process has in memory."""
        ...

    async def fetch(self, key: bytes) -> tuple[bytes, str] | None:
        """What the second level has, with the level's name; it is in memory from then on."""
        ...

    def keep(self, key: bytes, value: bytes, tags: CacheTags) -> None:
        """Keep in memory at once, and on the second level soon."""
        ...

    @property
    def purges(self) -> int:
        """Grows with each purge that this process knows of."""
        ...


class Publishes(Protocol):
    """What is kept here other processes can read, a little later."""

    told: Callable[[Sequence[bytes], bool], None] | None
    """Called once for all that is kept, with several names at a time, which may repeat: whether others can read these now."""

    @property
    def shared(self) -> bool:
        """Whether the level that all read is there and in use."""
        ...

    def hurry(self) -> None:
        """Somebody waits for what others can't read yet."""
        ...


@runtime_checkable
class Rewinds(Protocol):
    """A runner that may be able to try tokens out."""

    @property
    def rewinds(self) -> bool:
        """Whether a token may be computed at a position where another one was before, and several tokens of a sequence in one step
        as sequences of their own over the same blocks, each seeing those before it."""
        ...


@runtime_checkable
class OnGpus(Protocol):
    """A runner that may have its model on GPUs."""

    def gpu_memory(self) -> tuple[int, int]:
        """Bytes in use and in all on them; zeroes where it is elsewhere. May be asked from any thread, often."""
        ...


@runtime_checkable
class Overlaps(Protocol):
    """A runner that lets the last step's results be handed out while the device computes the next."""

    meanwhile: Callable[[], None] | None
    """Called on the step thread once in each `forward`, when the device is at work."""


@runtime_checkable
class HearsOfWarmUp(Protocol):
    """A runner that leaves something for when its first steps are over."""

    def warmed_up(self) -> None:
        """They are; called on the step thread."""


@runtime_checkable
class KeepsOld(Protocol):
    """A response cache that keeps answers for a while after they have expired."""

    async def old(self, key: bytes) -> tuple[bytes, str] | None:
        """What there is, fresh or not, with its level's name. Never fails, as `Answers`."""
        ...


class Step(Protocol):
    """One step of the journey. Entering may refuse (raise), reserve, or set `call.source`; leaving settles."""

    def __call__(self, call: Call) -> AbstractAsyncContextManager[None]: ...
