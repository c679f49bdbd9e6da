"""Keys, tenants and the audit log in this process's memory: for a server without lasting keys, and for tests."""

from __future__ import annotations

import msgspec

from headrace.records import AuditEntry, KeyChanges, KeyRecord, KnownKey, TenantRecord


class MemoryKeys:
    """`KeyRegister` and `Audit` that end with the process."""

    def __init__(self) -> None:
        self._keys: dict[str, KeyRecord] = {}
        self._retired: dict[bytes, tuple[str, float]] = {}
        self._tenants: dict[str, TenantRecord] = {}
        self._changed: dict[tuple[str, str], int] = {}
        self._version = 1
        self._check: bytes | None = None
        self._entries: list[AuditEntry] = []

    async def find(self, digest: bytes) -> KnownKey | None:
        key = next((key for key in self._keys.values() if key.digest == digest), None)
        if key is None:
            if digest not in self._retired:
                return None
            key_id, ends_at = self._retired[digest]
            key = self._keys[key_id]
            ends_at = ends_at if key.expires_at is None else min(ends_at, key.expires_at)
            key = msgspec.structs.replace(key, expires_at=ends_at, digest=digest)
        return KnownKey(key, self._tenants[key.tenant])

    async def changes(self, since: int) -> KeyChanges:
        newer = [what for what, version in self._changed.items() if since and version > since]
        return KeyChanges(
            self._version,
            frozenset(name for kind, name in newer if kind == "key"),
            frozenset(name for kind, name in newer if kind == "tenant"),
        )

    async def keys(self, tenant: str | None = None) -> list[KeyRecord]:
        found = [key for key in self._keys.values() if tenant in (None, key.tenant)]
        return sorted(found, key=lambda key: (key.created_at, key.id))

    async def key(self, key_id: str) -> KeyRecord | None:
        return self._keys.get(key_id)

    async def add(self, record: KeyRecord, entry: AuditEntry) -> None:
        if record.tenant not in self._tenants:
            self._tenants[record.tenant] = TenantRecord(name=record.tenant, created_at=record.created_at)
            self._change("tenant", record.tenant)
        self._keys[record.id] = record
        self._change("key", record.id)
        await self.note(entry)

    async def revoke(self, key_id: str, at: float, entry: AuditEntry) -> bool:
        key = self._keys.get(key_id)
        if key is None or key.revoked_at is not None:
            return False
        self._keys[key_id] = msgspec.structs.replace(key, revoked_at=at)
        self._change("key", key_id)
        await self.note(entry)
        return True

    async def rotate(self, key_id: str, prefix: str, digest: bytes, old_ends_at: float, entry: AuditEntry) -> bool:
        key = self._keys.get(key_id)
        if key is None or key.revoked_at is not None:
            return False
        for old, (owner, ends_at) in self._retired.items():
            if owner == key_id:
                self._retired[old] = (owner, min(ends_at, old_ends_at))
        self._retired[key.digest] = (key_id, old_ends_at)
        self._keys[key_id] = msgspec.structs.replace(key, prefix=prefix, digest=digest)
        self._change("key", key_id)
        await self.note(entry)
        return True

    async def tenants(self) -> list[TenantRecord]:
        return [self._tenants[name] for name in sorted(self._tenants)]

    async def put_tenant(self, record: TenantRecord, entry: AuditEntry) -> None:
        known = self._tenants.get(record.name)
        created_at = record.created_at if known is None else known.created_at
        self._tenants[record.name] = msgspec.structs.replace(record, created_at=created_at)
        self._change("tenant", record.name)
        await self.note(entry)

    async def agree_on_pepper(self, check: bytes) -> bool:
        if self._check is None:
            self._check = check
        return self._check == check

    async def note(self, entry: AuditEntry) -> None:
        self._entries.append(msgspec.structs.replace(entry, id=len(self._entries) + 1))

    async def entries(self, *, since: float = 0.0, tenant: str | None = None, limit: int = 1000) -> list[AuditEntry]:
        found = [entry for entry in self._entries if entry.at >= since and tenant in (None, entry.tenant)]
        return found[-limit:]

    def _change(self, kind: str, name: str) -> None:
        self._version += 1
        self._changed[kind, name] = self._version
