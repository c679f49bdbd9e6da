"""Keys from a store, through the cache of an API process."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import AccessSection
from headrace.errors import Forbidden, RateLimited, StoreUnavailable, Unauthorized
from headrace.policies import bad_keys, known_keys
from headrace.policies.bad_keys import BadKeys
from headrace.policies.callers import Callers
from headrace.policies.key_desk import KeyDesk
from headrace.policies.key_secret import digest_of, looks_like_secret, new_secret
from headrace.policies.mint import Actor, Wish
from headrace.records import Caller, KeyChanges, KnownKey, Scope
from headrace.stores.memory_keys import MemoryKeys

pytestmark = pytest.mark.anyio
OPERATOR = Actor("cli:ada")
PEPPER = b"p" * 32


class CountedKeys(MemoryKeys):
    """A store that counts what it is asked, can be away, and can be slow."""

    def __init__(self) -> None:
        super().__init__()
        self.finds = self.checks = 0
        self.away = False
        self.hold: asyncio.Event | None = None

    async def find(self, digest: bytes) -> KnownKey | None:
        self.finds += 1
        found = await super().find(digest)
        if self.hold is not None:
            await self.hold.wait()
        if self.away:
            raise StoreUnavailable("away")
        return found

    async def changes(self, since: int) -> KeyChanges:
        self.checks += 1
        if self.away:
            raise StoreUnavailable("away")
        return await super().changes(since)


@dataclass
class House:
    access: AccessSection = field(default_factory=lambda: AccessSection(auth="keys"))
    keys: CountedKeys = field(default_factory=CountedKeys)

    def __post_init__(self) -> None:
        self.callers = self.another()
        self.desk = KeyDesk(self.keys, self.keys, PEPPER)

    def another(self) -> Callers:
        """Another API process."""
        return Callers(self.access, self.keys, PEPPER)

    async def admit(
        self, token: str | None, scope: Scope = "inference", *, callers: Callers | None = None, required: bool = False
    ) -> Caller:
        return await (callers or self.callers).admit(token, "192.0.2.1", scope, required=required)


async def until_refused(admit: Callable[[], Awaitable[object]]) -> float:
    """Seconds until a key is refused."""
    began = time.monotonic()
    while time.monotonic() - began < 5:
        try:
            await admit()
        except Unauthorized:
            return time.monotonic() - began
        await asyncio.sleep(0.01)
    raise AssertionError("the key was never refused")


async def test_a_key_brings_its_tenant() -> None:
    house = House()
    record, secret = await house.desk.create(Wish(name="a", tenant="acme", rpm=7), OPERATOR)
    other, other_secret = await house.desk.create(Wish(name="b", tenant="acme"), OPERATOR)
    caller = await house.admit(secret)
    assert caller.key == record
    assert caller.tenant is not None
    assert caller.tenant.name == "acme"
    assert caller.number == (await house.admit(other_secret)).number
    assert caller.number != (await house.admit((await house.desk.create(Wish(name="c"), OPERATOR))[1])).number
    assert other.tenant == "acme"


@pytest.mark.alone
async def test_known_keys_cost_no_look_up_and_little_time() -> None:
    house = House()
    _, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    await house.admit(secret)
    finds = house.keys.finds
    began = time.perf_counter()
    for _ in range(2000):
        assert house.callers.quick(secret, "192.0.2.1", "inference", required=False) is not None
    each = (time.perf_counter() - began) / 2000
    assert house.keys.finds == finds
    assert each < 100e-6  # about 5 µs on an idle machine; the bound is for a busy one


@pytest.mark.alone
async def test_revocation_reaches_every_process_within_a_second() -> None:
    house = House()
    processes = [house.another() for _ in range(3)]
    record, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    for process in processes:
        await house.admit(secret, callers=process)
    await house.desk.revoke(record.id, OPERATOR)
    took = await asyncio.gather(*(until_refused(lambda p=process: house.admit(secret, callers=p)) for process in processes))  # type: ignore[misc]
    assert max(took) < 1.0
    with pytest.raises(Unauthorized, match="revoked"):
        await house.admit(secret)


async def test_after_a_pause_nothing_old_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    monkeypatch.setattr(known_keys, "STALE", 0.02)
    monkeypatch.setattr(known_keys, "REFRESH", 0.01)
    record, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    await house.admit(secret)
    await house.desk.revoke(record.id, OPERATOR)
    await asyncio.sleep(0.03)
    with pytest.raises(Unauthorized):
        await house.admit(secret)


async def test_a_key_revoked_while_it_is_looked_up_is_not_remembered() -> None:
    house = House()
    record, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    _, other = await house.desk.create(Wish(name="b"), OPERATOR)
    await house.admit(other)
    house.keys.hold = asyncio.Event()
    slow = asyncio.create_task(house.admit(secret))
    while house.keys.finds < 2:
        await asyncio.sleep(0)
    await house.desk.revoke(record.id, OPERATOR)
    checks = house.keys.checks
    while house.keys.checks == checks:  # this process learns of the change before the look-up is over
        await house.admit(other)
        await asyncio.sleep(0.01)
    house.keys.hold.set()
    with pytest.raises(Unauthorized, match="revoked"):
        await slow


async def test_a_rotated_key_works_with_both_secrets_for_its_grace() -> None:
    house = House()
    record, old = await house.desk.create(Wish(name="a"), OPERATOR)
    await house.admit(old)
    rotated, new = await house.desk.rotate(record.id, OPERATOR, grace=0.5)
    assert (await house.admit(new)).key == rotated
    assert (await house.admit(old)).number == (await house.admit(new)).number
    assert await until_refused(lambda: house.admit(old)) < 1.6
    assert (await house.admit(new)).key == rotated


async def test_expired_keys_say_so() -> None:
    house = House()
    _, secret = await house.desk.create(Wish(name="a", expires_at=time.time() + 0.05), OPERATOR)
    await house.admit(secret)
    await until_refused(lambda: house.admit(secret))
    with pytest.raises(Unauthorized, match="expired"):
        await house.admit(secret)


async def test_changed_tenant_limits_arrive() -> None:
    house = House()
    _, secret = await house.desk.create(Wish(name="a", tenant="acme"), OPERATOR)
    await house.admit(secret)
    await house.desk.put_tenant("acme", {"rpm": 3}, OPERATOR)
    ends = time.monotonic() + 2
    while True:
        tenant = (await house.admit(secret)).tenant
        assert tenant is not None
        if tenant.limits.rpm == 3:
            break
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


async def test_scopes() -> None:
    house = House(AccessSection())
    _, secret = await house.desk.create(Wish(name="a", scopes=frozenset({"usage"})), OPERATOR)
    await house.admit(secret, "usage")
    for scope in ("inference", "admin"):
        with pytest.raises(Forbidden, match=scope):
            await house.admit(secret, scope)  # type: ignore[arg-type]


async def test_where_keys_are_optional_unknown_ones_are_ignored_and_revoked_ones_are_not() -> None:
    house = House(AccessSection())
    for token in (None, "sk-dummy", new_secret()):
        assert (await house.admit(token)).key is None
    record, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    assert (await house.admit(secret)).key == record
    await house.desk.revoke(record.id, OPERATOR)
    assert await until_refused(lambda: house.admit(secret)) < 1.0
    with pytest.raises(Unauthorized):
        await house.admit("sk-dummy", required=True)


async def test_known_keys_go_on_for_a_while_when_the_store_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(AccessSection(auth="keys", key_cache_ttl=1.5))
    monkeypatch.setattr(known_keys, "RETRY", 0.05)
    _, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    _, late = await house.desk.create(Wish(name="b"), OPERATOR)
    await house.admit(secret)
    house.keys.away = True
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        await house.admit(secret)
        await asyncio.sleep(0.02)
    with pytest.raises(StoreUnavailable):
        await house.admit(late)
    await asyncio.sleep(0.6)
    with pytest.raises(StoreUnavailable):
        await house.admit(secret)
    house.keys.away = False
    ends = time.monotonic() + 2
    while True:
        try:
            await house.admit(secret)
            break
        except StoreUnavailable:
            assert time.monotonic() < ends
        await asyncio.sleep(0.02)
    await house.admit(late)


async def test_a_key_met_by_one_process_goes_on_in_all_when_the_store_is_away() -> None:
    house = House()
    _, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    _, late = await house.desk.create(Wish(name="b"), OPERATOR)
    met: list[bytes] = []
    first, second = (Callers(house.access, house.keys, PEPPER, on_met=met.append) for _ in range(2))
    await house.admit(secret, callers=first)
    with pytest.raises(Unauthorized):
        await house.admit(new_secret(), callers=first)
    while not met:
        await asyncio.sleep(0)
    second.meet(met[0])
    while not second.quick(secret, "192.0.2.1", "inference", required=True):
        await asyncio.sleep(0)
    finds = house.keys.finds
    for process in (first, second):
        process.meet(met[0])
        await house.admit(secret, callers=process)
    assert house.keys.finds == finds
    house.keys.away = True
    assert (await house.admit(secret, callers=second)).key is not None
    with pytest.raises(StoreUnavailable):
        await house.admit(late, callers=second)
    assert len(met) == 1


@pytest.mark.alone
async def test_a_store_that_hangs_holds_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    monkeypatch.setattr(known_keys, "CHECK_TIMEOUT", 0.1)
    record, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    await house.admit(secret)
    monkeypatch.setattr(house.keys, "changes", lambda since: asyncio.sleep(60))
    began = time.monotonic()
    while time.monotonic() - began < 1.2:
        asked = time.monotonic()
        assert (await house.admit(secret)).key == record
        assert time.monotonic() - asked < 0.5
        await asyncio.sleep(0.02)


async def test_one_unknown_key_is_looked_up_once() -> None:
    house = House()
    unknown = new_secret()
    for _ in range(5):
        with pytest.raises(Unauthorized):
            await house.admit(unknown)
    assert house.keys.finds == 1
    with pytest.raises(Unauthorized):
        await house.admit("no key of ours")
    assert house.keys.finds == 1


@pytest.mark.alone
async def test_many_bad_keys_slow_only_their_own_address_down(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    _, known = await house.desk.create(Wish(name="a"), OPERATOR)
    _, fresh = await house.desk.create(Wish(name="b"), OPERATOR)
    await house.admit(known)

    async def attack() -> str:
        try:
            await house.callers.admit(new_secret(), "198.51.100.9", "inference", required=True)
        except (Unauthorized, RateLimited) as error:
            return error.code
        return "in"

    attacks = [asyncio.create_task(attack()) for _ in range(300)]
    while house.keys.finds < 100:
        await asyncio.sleep(0)
    began = time.monotonic()
    # Others, and the attacker's neighbours who have keys, known or not, wait for nothing.
    for address in ("192.0.2.1", "198.51.100.9"):
        assert (await house.callers.admit(known, address, "inference", required=True)).key is not None
    assert (await house.callers.admit(fresh, "192.0.2.1", "inference", required=True)).key is not None
    with pytest.raises(Unauthorized):
        await house.callers.admit(new_secret(), "192.0.2.1", "inference", required=True)
    assert time.monotonic() - began < 0.5
    done, waiting = await asyncio.wait(attacks, timeout=1)
    codes = [task.result() for task in done]
    assert "in" not in codes
    assert codes.count("invalid_api_key") <= bad_keys.BURST + 2
    assert codes.count("rate_limited") > 200
    assert 0 < len(waiting) <= bad_keys.MOST_WAITING
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_accounts_of_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_keys, "MOST_ADDRESSES", 100)
    accounts = BadKeys()
    for number in range(1000):
        await accounts.note(f"10.0.{number // 256}.{number % 256}")
    assert len(accounts._accounts) <= 100


def test_secrets_have_256_bits_and_one_form() -> None:
    secrets = {new_secret() for _ in range(200)}
    assert len(secrets) == 200
    assert all(looks_like_secret(secret) and secret.startswith("hr-") and len(secret) == 46 for secret in secrets)
    assert not any(looks_like_secret(text) for text in ("", "hr-", "hr-" + "a" * 42, "hr-" + "a" * 44, "hr-" + "é" * 43, "sk-" + "a" * 43))


async def test_what_is_stored_is_no_secret() -> None:
    house = House()
    _, secret = await house.desk.create(Wish(name="a"), OPERATOR)
    stored = msgspec.json.encode(await house.keys.keys()).decode() + repr(await house.keys.keys()) + repr(await house.keys.entries())
    assert secret[10:] not in stored


@given(st.binary(min_size=1, max_size=100), st.text(alphabet=st.characters(codec="utf-8"), max_size=100))
def test_the_digest_is_hmac_sha_256(pepper: bytes, secret: str) -> None:
    assert digest_of(secret, pepper) == hmac.digest(pepper, secret.encode(), "sha256")
