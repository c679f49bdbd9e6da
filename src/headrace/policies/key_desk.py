"""Administers keys and tenants, for the command line and the routes under /admin alike; every change is in the audit log."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from headrace.errors import Forbidden, NotFound
from headrace.policies.key_secret import SHOWN, digest_of, new_secret
from headrace.policies.mint import Actor, Wish, limits_from, mint, printable, refuse_broader
from headrace.ports import Audit, KeyRegister
from headrace.records import AuditEntry, KeyRecord, TenantRecord


class KeyDesk:
    """What an `Actor` does with keys and tenants. All raise `Forbidden` beyond the actor's reach, and `StoreUnavailable`."""

    def __init__(self, register: KeyRegister, audit: Audit, pepper: bytes) -> None:
        self._register = register
        self._audit = audit
        self._pepper = pepper

    async def create(self, wish: Wish, by: Actor) -> tuple[KeyRecord, str]:
        """A new key and its secret, which is nowhere else. Raises `InvalidParameter`."""
        secret = new_secret()
        record = mint(wish, by, prefix=secret[:SHOWN], digest=digest_of(secret, self._pepper), now=time.time())
        details = public(record)
        for name in ("id", "tenant", "created_at", "created_by", "revoked_at", "status"):
            del details[name]
        await self._register.add(record, _entry(by, "key.create", record.id, record.tenant, **details))
        return record, secret

    async def keys(self, by: Actor) -> list[KeyRecord]:
        return await self._register.keys(None if by.everywhere or by.key is None else by.key.tenant)

    async def key(self, key_id: str, by: Actor) -> KeyRecord:
        """Raises `NotFound`, also for keys beyond reach."""
        found = await self._register.key(key_id)
        if found is None or not by.reaches(found.tenant):
            raise NotFound(f"There is no key {key_id[:60]!r} here.", param="id")
        return found

    async def revoke(self, key_id: str, by: Actor) -> KeyRecord:
        """End a key for good. Once more changes nothing. Raises `NotFound`."""
        found = await self.key(key_id, by)
        if found.all_tenants and not by.everywhere:
            raise Forbidden("Your key administers one tenant, and this one administers all.")
        entry = _entry(by, "key.revoke", key_id, found.tenant, name=found.name, prefix=found.prefix)
        await self._register.revoke(key_id, entry.at, entry)
        return await self.key(key_id, by)

    async def rotate(self, key_id: str, by: Actor, *, grace: float = 0.0) -> tuple[KeyRecord, str]:
        """A new secret for a key; the old one works for `grace` seconds more. Raises `NotFound`.

        Who has a key's secret has the key: rotating is allowed where making it would be.
        """
        found = await self.key(key_id, by)
        refuse_broader(found, by)
        secret = new_secret()
        prefix = secret[:SHOWN]
        entry = _entry(by, "key.rotate", key_id, found.tenant, name=found.name, old=found.prefix, new=prefix, grace=grace)
        if not await self._register.rotate(key_id, prefix, digest_of(secret, self._pepper), entry.at + grace, entry):
            raise Forbidden("This key was revoked; make a new one.")
        return await self.key(key_id, by), secret

    async def tenants(self, by: Actor) -> list[TenantRecord]:
        return [tenant for tenant in await self._register.tenants() if by.reaches(tenant.name)]

    async def tenant(self, name: str, by: Actor) -> TenantRecord:
        """Raises `NotFound`, also for tenants beyond reach."""
        found = next((tenant for tenant in await self.tenants(by) if tenant.name == name), None)
        if found is None:
            raise NotFound(f"There is no tenant {name[:60]!r} here.", param="name")
        return found

    async def put_tenant(self, name: str, changes: dict[str, Any], by: Actor) -> TenantRecord:
        """Make a tenant, or change the limits that `changes` names; None takes one away. Raises `InvalidParameter`.

        Only for who administers all tenants: a tenant's own administrator would be free of its limits.
        """
        if not by.everywhere:
            raise Forbidden("Only an administrator of all tenants changes a tenant's limits.")
        name = printable(name, "name")
        known = {tenant.name: tenant for tenant in await self._register.tenants()}.get(name)
        before = msgspec.structs.asdict(known.limits) if known is not None else {}
        limits = limits_from({**before, **changes}, period=changes.get("budget_period"))
        entry = _entry(by, "tenant.change" if known else "tenant.create", name, name, **msgspec.to_builtins(limits))
        record = TenantRecord(name=name, limits=limits, created_at=known.created_at if known else entry.at)
        await self._register.put_tenant(record, entry)
        return record

    async def audit(self, by: Actor, *, since: float = 0.0, limit: int = 1000) -> list[AuditEntry]:
        """The newest entries, oldest first; of the actor's tenant, unless it administers all."""
        tenant = None if by.everywhere or by.key is None else by.key.tenant
        return await self._audit.entries(since=since, tenant=tenant, limit=limit)


def public(record: KeyRecord) -> dict[str, Any]:
    """A key as it is shown; times are Unix seconds."""
    ended = record.expires_at is not None and record.expires_at <= time.time()
    return {
        "id": record.id,
        "name": record.name,
        "prefix": record.prefix,
        "tenant": record.tenant,
        "all_tenants": record.all_tenants,
        "models": list(record.models),
        "scopes": sorted(record.scopes),
        "priority": record.priority,
        **public_limits(record),
        "status": "revoked" if record.revoked_at is not None else "expired" if ended else "active",
        "created_at": record.created_at,
        "created_by": record.created_by,
        "expires_at": record.expires_at,
        "revoked_at": record.revoked_at,
    }


def public_limits(record: KeyRecord | TenantRecord) -> dict[str, Any]:
    limits: dict[str, Any] = msgspec.structs.asdict(record.limits)
    if limits["budget_tokens"] is None:
        limits["budget_period"] = None
    return limits


def public_tenant(record: TenantRecord) -> dict[str, Any]:
    return {"name": record.name, **public_limits(record), "created_at": record.created_at}


def _entry(by: Actor, action: str, subject: str, tenant: str, **details: Any) -> AuditEntry:
    return AuditEntry(at=time.time(), actor=by.name, action=action, subject=subject, tenant=tenant, details=details)
