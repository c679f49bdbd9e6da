"""What keys may be made, and by whom: nobody makes one that is broader than their own.

An operator at the command line may make any. A key with scope `admin` may make keys within its own reach: its tenant (any, if
it administers all), its models, its scopes, its limits and its lifetime. What a wish leaves open is inherited from the maker.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import get_args

import msgspec

from headrace.errors import Forbidden, InvalidParameter
from headrace.records import KeyRecord, LimitSpec, Scope
from headrace.types import PRIORITIES, Priority

SCOPES: tuple[Scope, ...] = get_args(Scope)
_COUNTS = ("rpm", "tpm", "concurrency", "budget_tokens")


@dataclass(frozen=True, slots=True)
class Actor:
    """Who administers."""

    name: str
    """A key's id, or `cli:` and the name of the machine's user."""
    key: KeyRecord | None = None
    """None for the operator at the command line, who may do everything."""

    @property
    def everywhere(self) -> bool:
        return self.key is None or self.key.all_tenants

    def reaches(self, tenant: str) -> bool:
        return self.everywhere or (self.key is not None and self.key.tenant == tenant)


@dataclass(frozen=True, slots=True)
class Wish:
    """A key that somebody wants. None leaves it to the maker's own."""

    name: str
    tenant: str | None = None
    models: tuple[str, ...] = ()
    scopes: frozenset[Scope] | None = None
    rpm: int | None = None
    tpm: int | None = None
    concurrency: int | None = None
    budget_tokens: int | None = None
    budget_period: str | None = None
    expires_at: float | None = None
    priority: Priority | None = None
    """The ceiling of its requests; None is `default`, or the maker's own if that is lower."""


def mint(wish: Wish, by: Actor, *, prefix: str, digest: bytes, now: float) -> KeyRecord:
    """The record of the key that `by` may make. Raises `Forbidden`, which names what is broader, and `InvalidParameter`."""
    key_id = f"key_{secrets.token_hex(8)}"
    scopes = wish.scopes if wish.scopes is not None else frozenset[Scope]({"inference"})
    limits = _limits(wish, by.key)
    tenant, all_tenants = _place(wish, by, key_id, scopes)
    expires_at = wish.expires_at
    if expires_at is None and by.key is not None:
        expires_at = by.key.expires_at
    if expires_at is not None and expires_at <= now:
        raise InvalidParameter("The key would be expired from the start.", param="expires")
    record = KeyRecord(
        id=key_id,
        name=printable(wish.name, "name"),
        prefix=prefix,
        digest=digest,
        tenant=printable(tenant, "tenant"),
        models=wish.models or (by.key.models if by.key is not None else ()),
        scopes=scopes,
        limits=limits,
        created_at=now,
        created_by=by.name,
        expires_at=expires_at,
        all_tenants=all_tenants,
        priority=wish.priority or _ceiling(by),
    )
    refuse_broader(record, by)
    return record


def refuse_broader(record: KeyRecord, by: Actor) -> None:
    """Raises `Forbidden`, naming in what `record` goes beyond the actor's own key."""
    own = by.key
    if own is None:
        return
    if not by.reaches(record.tenant) or (record.all_tenants and not own.all_tenants):
        raise Forbidden(f"Your key administers the tenant {own.tenant!r} only.", param="tenant")
    if record.scopes - own.scopes:
        raise Forbidden(
            f"Your key doesn't have the scope {', '.join(sorted(record.scopes - own.scopes))}, so it can't make a key that does.",
            param="scopes",
        )
    if PRIORITIES.index(record.priority) > PRIORITIES.index(own.priority):
        raise Forbidden(f"Your key's highest priority is {own.priority}, so it can't make a key with a higher one.", param="priority")
    if own.models and (not record.models or set(record.models) - set(own.models)):
        raise Forbidden(f"Your key may use {', '.join(own.models)}, so it can't make a key for other models.", param="models")
    for name in _COUNTS:
        most, wanted = getattr(own.limits, name), getattr(record.limits, name)
        if most is not None and (wanted is None or wanted > most):
            raise Forbidden(f"Your key has {name} {most}, so it can't make a key with more.", param=name)
    if own.limits.budget_tokens is not None and record.limits.budget_period != own.limits.budget_period:
        raise Forbidden(
            f"Your key's budget is by {own.limits.budget_period}, so it can't make a key with another period.", param="budget_period"
        )
    if own.expires_at is not None and (record.expires_at is None or record.expires_at > own.expires_at):
        raise Forbidden("Your key expires before that, so it can't make a key that lives longer.", param="expires")


def _ceiling(by: Actor) -> Priority:
    """Of a key that names none."""
    return "sheddable" if by.key is not None and by.key.priority == "sheddable" else "default"


def limits_from(wanted: dict[str, int | str | None], *, period: object) -> LimitSpec:
    """Limits, checked. `period`: what was asked for in so many words, if anything. Raises `InvalidParameter`."""
    if period is not None and wanted.get("budget_tokens") is None:
        raise InvalidParameter("A `period` is that of a budget, and there is none: set `budget_tokens`, too.", param="period")
    for name in _COUNTS:
        value = wanted.get(name)
        if value is not None and not 1 <= int(value) < 2**63:
            raise InvalidParameter(f"{name} is at least 1.", param=name)
    try:
        return msgspec.convert({name: value for name, value in wanted.items() if value is not None}, LimitSpec)
    except msgspec.ValidationError as error:
        raise InvalidParameter(f"A limit is not valid: {error}.", param="period") from None


def _limits(wish: Wish, own: KeyRecord | None) -> LimitSpec:
    wanted: dict[str, int | str | None] = {name: getattr(wish, name) for name in _COUNTS}
    wanted["budget_period"] = wish.budget_period
    if own is not None:
        inherited = msgspec.structs.asdict(own.limits)
        wanted = {name: inherited[name] if value is None else value for name, value in wanted.items()}
    return limits_from(wanted, period=wish.budget_period)


def _place(wish: Wish, by: Actor, key_id: str, scopes: frozenset[Scope]) -> tuple[str, bool]:
    """The tenant, and whether the key administers all of them.

    A key for no tenant in particular is a tenant by itself, so that nothing is shared by accident. An administrator's key that names no
    tenant reaches as far as its maker.
    """
    if wish.tenant is not None:
        return wish.tenant, False
    if by.everywhere:
        return key_id, "admin" in scopes
    assert by.key is not None
    return by.key.tenant, False


def printable(text: str, param: str) -> str:
    """A name as it is kept. Raises `InvalidParameter`."""
    text = text.strip()
    if not 1 <= len(text) <= 128 or not text.isprintable():
        raise InvalidParameter(f"The {param} has 1 to 128 printable characters.", param=param)
    return text
