"""What stores keep: keys and tenants and who changed them, the bill's rows, errors, and whose a cached answer is.

Times are Unix times in seconds; counts are tokens unless a name says bytes.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any, Literal

import msgspec

from headrace.types import Priority

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
