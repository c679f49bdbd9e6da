"""Keys, tenants and the audit log in SQL.

Every change raises `key_changes.version` and stamps what it touched with it, in the same transaction: whoever polls the version
learns of all changes, in order, and of nothing that is not yet committed.
"""

from __future__ import annotations

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from headrace.records import AuditEntry, KeyChanges, KeyRecord, KnownKey, TenantRecord
from headrace.stores.database import Database
from headrace.stores.key_rows import (
    AUDIT,
    CHANGES,
    KEYS,
    RETIRED,
    TENANTS,
    audit_row,
    entry_of,
    key_of,
    key_row,
    tenant_of,
    tenant_row,
)


class SqlKeys:
    """`KeyRegister` and `Audit` over a `Database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find(self, digest: bytes) -> KnownKey | None:
        async with self._database.session(read_only=True) as session:
            row = (await session.execute(sa.select(KEYS).where(KEYS.c.digest == digest))).one_or_none()
            ends_at: float | None = None
            if row is None:
                joined = sa.select(KEYS, RETIRED.c.ends_at).join(RETIRED, RETIRED.c.key_id == KEYS.c.id)
                row = (await session.execute(joined.where(RETIRED.c.digest == digest))).one_or_none()
                if row is None:
                    return None
                ends_at = row.ends_at
            key = key_of(row)
            tenant = tenant_of((await session.execute(sa.select(TENANTS).where(TENANTS.c.name == key.tenant))).one())
        if ends_at is not None:
            ends_at = ends_at if key.expires_at is None else min(ends_at, key.expires_at)
            key = msgspec.structs.replace(key, expires_at=ends_at, digest=digest)
        return KnownKey(key, tenant)

    async def changes(self, since: int) -> KeyChanges:
        async with self._database.session(read_only=True) as session:
            # One statement sees one state; two would not on PostgreSQL.
            parts = [sa.select(sa.literal("version").label("kind"), sa.cast(CHANGES.c.version, sa.String).label("name"))]
            if since:
                parts.append(sa.select(sa.literal("key"), KEYS.c.id).where(KEYS.c.changed > since))
                parts.append(sa.select(sa.literal("tenant"), TENANTS.c.name).where(TENANTS.c.changed > since))
            rows = (await session.execute(sa.union_all(*parts))).all()
        version = next(int(row.name) for row in rows if row.kind == "version")
        return KeyChanges(
            version, frozenset(row.name for row in rows if row.kind == "key"), frozenset(row.name for row in rows if row.kind == "tenant")
        )

    async def keys(self, tenant: str | None = None) -> list[KeyRecord]:
        wanted = sa.select(KEYS).order_by(KEYS.c.created_at, KEYS.c.id)
        if tenant is not None:
            wanted = wanted.where(KEYS.c.tenant == tenant)
        async with self._database.session(read_only=True) as session:
            return [key_of(row) for row in await session.execute(wanted)]

    async def key(self, key_id: str) -> KeyRecord | None:
        async with self._database.session(read_only=True) as session:
            row = (await session.execute(sa.select(KEYS).where(KEYS.c.id == key_id))).one_or_none()
        return None if row is None else key_of(row)

    async def add(self, record: KeyRecord, entry: AuditEntry) -> None:
        async with self._database.session() as session:
            changed = await _next_version(session)
            known = (await session.execute(sa.select(TENANTS.c.name).where(TENANTS.c.name == record.tenant))).first()
            if known is None:
                tenant = TenantRecord(name=record.tenant, created_at=record.created_at)
                await session.execute(sa.insert(TENANTS).values(tenant_row(tenant, changed)))
            await session.execute(sa.insert(KEYS).values(key_row(record, changed)))
            await session.execute(sa.insert(AUDIT).values(audit_row(entry)))

    async def revoke(self, key_id: str, at: float, entry: AuditEntry) -> bool:
        async with self._database.session() as session:
            changed = await _next_version(session)
            living = sa.update(KEYS).where(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
            done = await session.execute(living.values(revoked_at=at, changed=changed))
            if done.rowcount == 0:
                return False
            await session.execute(sa.insert(AUDIT).values(audit_row(entry)))
        return True

    async def rotate(self, key_id: str, prefix: str, digest: bytes, old_ends_at: float, entry: AuditEntry) -> bool:
        async with self._database.session() as session:
            changed = await _next_version(session)
            living = sa.and_(KEYS.c.id == key_id, KEYS.c.revoked_at.is_(None))
            old = (await session.execute(sa.select(KEYS.c.digest).where(living))).scalar_one_or_none()
            if old is None:
                return False
            # An older secret's grace never grows.
            earlier = sa.update(RETIRED).where(RETIRED.c.key_id == key_id, RETIRED.c.ends_at > old_ends_at)
            await session.execute(earlier.values(ends_at=old_ends_at))
            await session.execute(sa.insert(RETIRED).values(digest=old, key_id=key_id, ends_at=old_ends_at))
            await session.execute(sa.update(KEYS).where(living).values(digest=digest, prefix=prefix, changed=changed))
            await session.execute(sa.insert(AUDIT).values(audit_row(entry)))
        return True

    async def tenants(self) -> list[TenantRecord]:
        async with self._database.session(read_only=True) as session:
            return [tenant_of(row) for row in await session.execute(sa.select(TENANTS).order_by(TENANTS.c.name))]

    async def put_tenant(self, record: TenantRecord, entry: AuditEntry) -> None:
        async with self._database.session() as session:
            row = tenant_row(record, await _next_version(session))
            known = {name: value for name, value in row.items() if name not in ("name", "created_at")}
            done = await session.execute(sa.update(TENANTS).where(TENANTS.c.name == record.name).values(known))
            if done.rowcount == 0:
                await session.execute(sa.insert(TENANTS).values(row))
            await session.execute(sa.insert(AUDIT).values(audit_row(entry)))

    async def agree_on_pepper(self, check: bytes) -> bool:
        async with self._database.session() as session:
            await session.execute(sa.update(CHANGES).where(CHANGES.c.pepper_check.is_(None)).values(pepper_check=check))
            found = (await session.execute(sa.select(CHANGES.c.pepper_check))).scalar_one()
        return bytes(found) == check

    async def note(self, entry: AuditEntry) -> None:
        async with self._database.session() as session:
            await session.execute(sa.insert(AUDIT).values(audit_row(entry)))

    async def entries(self, *, since: float = 0.0, tenant: str | None = None, limit: int = 1000) -> list[AuditEntry]:
        wanted = sa.select(AUDIT).where(AUDIT.c.at >= since).order_by(AUDIT.c.id.desc()).limit(limit)
        if tenant is not None:
            wanted = wanted.where(AUDIT.c.tenant == tenant)
        async with self._database.session(read_only=True) as session:
            return [entry_of(row) for row in await session.execute(wanted)][::-1]


async def _next_version(session: AsyncConnection) -> int:
    """Also the lock that puts changes in order: it is held until the commit."""
    raised = sa.update(CHANGES).values(version=CHANGES.c.version + 1).returning(CHANGES.c.version)
    return int((await session.execute(raised)).scalar_one())
