"""What every store of keys does, in memory, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from headrace.records import AuditEntry, KeyRecord, LimitSpec, TenantRecord
from headrace.stores.database import Database
from headrace.stores.memory_keys import MemoryKeys
from headrace.stores.sql_keys import SqlKeys

pytestmark = pytest.mark.anyio
Store = SqlKeys | MemoryKeys


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    if request.param == "memory":
        yield MemoryKeys()
        return
    url = f"sqlite:///{tmp_path}/keys.db" if request.param == "sqlite" else request.getfixturevalue("postgres_server").new_database()
    database = Database(url)
    await database.migrate()
    yield SqlKeys(database)
    await database.close()


def key(number: int = 1, **more: object) -> KeyRecord:
    record = KeyRecord(
        id=f"key_{number}",
        name=f"Schlüssel {number} 钥匙",
        prefix=f"hr-{number}",
        digest=bytes([number]) * 32,
        tenant="acme",
        models=("a", "b, c"),
        scopes=frozenset({"inference", "usage"}),
        limits=LimitSpec(rpm=3, tpm=2**40, budget_tokens=10**12, budget_period="day"),
        created_at=1000.5 + number,
        created_by="cli:ada",
    )
    return msgspec.structs.replace(record, **more)


def entry(action: str = "key.create", at: float = 5.0, tenant: str = "acme") -> AuditEntry:
    return AuditEntry(at=at, actor="cli:ada", action=action, subject="key_1", tenant=tenant, details={"name": "é", "n": 1})


async def test_a_key_comes_back_as_it_was_put(store: Store) -> None:
    full = key(1, expires_at=2000.25, all_tenants=True)
    await store.add(full, entry())
    await store.add(key(2, models=(), scopes=frozenset({"admin"}), limits=LimitSpec()), entry())
    found = await store.find(full.digest)
    assert found is not None
    assert found.key == full == await store.key("key_1")
    assert found.tenant == TenantRecord(name="acme", created_at=full.created_at)
    assert [record.id for record in await store.keys()] == ["key_1", "key_2"]
    assert (await store.keys())[1] == key(2, models=(), scopes=frozenset({"admin"}), limits=LimitSpec())
    assert await store.find(b"\0" * 32) is None
    assert await store.key("key_3") is None


async def test_keys_by_tenant(store: Store) -> None:
    await store.add(key(1), entry())
    await store.add(key(2, tenant="other"), entry())
    assert [record.id for record in await store.keys("other")] == ["key_2"]
    assert [tenant.name for tenant in await store.tenants()] == ["acme", "other"]


async def test_a_key_is_revoked_once(store: Store) -> None:
    await store.add(key(1), entry())
    assert await store.revoke("key_1", 77.0, entry("key.revoke"))
    assert not await store.revoke("key_1", 88.0, entry("key.revoke"))
    assert not await store.revoke("key_9", 88.0, entry("key.revoke"))
    found = await store.find(key(1).digest)
    assert found is not None
    assert found.key.revoked_at == 77.0
    assert [line.action for line in await store.entries()] == ["key.create", "key.revoke"]


async def test_a_rotated_key_has_a_new_secret_and_the_old_one_ends(store: Store) -> None:
    await store.add(key(1, expires_at=5000.0), entry())
    assert await store.rotate("key_1", "hr-new", b"n" * 32, 3000.0, entry("key.rotate"))
    new, old = await store.find(b"n" * 32), await store.find(key(1).digest)
    assert new is not None
    assert old is not None
    assert (new.key.id, new.key.prefix, new.key.expires_at) == ("key_1", "hr-new", 5000.0)
    assert (old.key.id, old.key.expires_at) == ("key_1", 3000.0)
    # Again, and at once: neither old secret outlives it.
    assert await store.rotate("key_1", "hr-newer", b"m" * 32, 2000.0, entry("key.rotate"))
    for digest in (key(1).digest, b"n" * 32):
        ended = await store.find(digest)
        assert ended is not None
        assert ended.key.expires_at == 2000.0
    assert await store.revoke("key_1", 9.0, entry("key.revoke"))
    for digest in (key(1).digest, b"n" * 32, b"m" * 32):
        ended = await store.find(digest)
        assert ended is not None
        assert ended.key.revoked_at == 9.0
    assert not await store.rotate("key_1", "hr-x", b"x" * 32, 1.0, entry("key.rotate"))
    assert not await store.rotate("key_9", "hr-x", b"x" * 32, 1.0, entry("key.rotate"))


async def test_tenants_have_limits(store: Store) -> None:
    await store.add(key(1), entry())
    limits = LimitSpec(rpm=7, budget_tokens=9, budget_period="total")
    await store.put_tenant(TenantRecord(name="acme", limits=limits, created_at=1.0), entry("tenant.change"))
    await store.put_tenant(TenantRecord(name="new", limits=limits, created_at=2.0), entry("tenant.create"))
    found = await store.find(key(1).digest)
    assert found is not None
    assert found.tenant == TenantRecord(name="acme", limits=limits, created_at=key(1).created_at)
    assert await store.tenants() == [found.tenant, TenantRecord(name="new", limits=limits, created_at=2.0)]


async def test_every_change_is_seen_by_who_polls(store: Store) -> None:
    start = await store.changes(0)
    assert (start.keys, start.tenants) == (frozenset(), frozenset())
    assert await store.changes(start.version) == start
    await store.add(key(1), entry())
    added = await store.changes(start.version)
    assert added.version > start.version
    assert (added.keys, added.tenants) == ({"key_1"}, {"acme"})
    await store.add(key(2), entry())
    await store.rotate("key_1", "hr-n", b"n" * 32, 0.0, entry("key.rotate"))
    assert (await store.changes(added.version)).keys == {"key_1", "key_2"}
    before = await store.changes(0)
    await store.revoke("key_2", 1.0, entry("key.revoke"))
    assert (await store.changes(before.version)).keys == {"key_2"}
    before = await store.changes(0)
    await store.put_tenant(TenantRecord(name="acme"), entry("tenant.change"))
    after = await store.changes(before.version)
    assert (after.keys, after.tenants) == (frozenset(), {"acme"})


async def test_changes_side_by_side_all_get_their_own_version(store: Store) -> None:
    start = (await store.changes(0)).version
    await asyncio.gather(*(store.add(key(number), entry()) for number in range(1, 13)))
    changes = await store.changes(start)
    assert len(changes.keys) == 12
    assert changes.version >= start + 12
    assert len(await store.entries()) == 12


async def test_the_audit_log_is_read_from_its_newest_end(store: Store) -> None:
    for number in range(5):
        await store.note(entry(f"a{number}", at=float(number), tenant="even" if number % 2 == 0 else "odd"))
    lines = await store.entries()
    assert [(line.action, line.at, line.details) for line in lines] == [(f"a{n}", float(n), {"name": "é", "n": 1}) for n in range(5)]
    assert [line.id for line in lines] == sorted({line.id for line in lines})
    assert [line.action for line in await store.entries(limit=2)] == ["a3", "a4"]
    assert [line.action for line in await store.entries(since=3.0)] == ["a3", "a4"]
    assert [line.action for line in await store.entries(tenant="odd")] == ["a1", "a3"]


async def test_the_first_pepper_stays(store: Store) -> None:
    assert await store.agree_on_pepper(b"a" * 32)
    assert await store.agree_on_pepper(b"a" * 32)
    assert not await store.agree_on_pepper(b"b" * 32)
