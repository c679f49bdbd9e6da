"""Nobody makes a key that is broader than their own."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from headrace.errors import Forbidden, InvalidParameter, NotFound
from headrace.policies.key_desk import KeyDesk
from headrace.policies.mint import Actor, Wish, mint
from headrace.records import KeyRecord, LimitSpec, Scope
from headrace.stores.memory_keys import MemoryKeys

NOW = 1000.0
OPERATOR = Actor("cli:ada")


def minted(wish: Wish, by: Actor = OPERATOR) -> KeyRecord:
    return mint(wish, by, prefix="hr-x", digest=b"d" * 32, now=NOW)


def admin(**more: Any) -> Actor:
    record = minted(Wish(name="admin", scopes=frozenset({"inference", "admin"}), **more))
    return Actor(record.id, record)


counts = st.none() | st.integers(1, 5)
wishes = st.builds(
    Wish,
    name=st.just("k"),
    tenant=st.none() | st.sampled_from(["acme", "other"]),
    models=st.lists(st.sampled_from("abc"), max_size=2, unique=True).map(tuple),
    scopes=st.none() | st.frozensets(st.sampled_from(get_args(Scope)), min_size=1),
    rpm=counts,
    tpm=counts,
    concurrency=counts,
    budget_tokens=counts,
    budget_period=st.none() | st.sampled_from(["day", "month", "total"]),
    expires_at=st.none() | st.floats(NOW + 1, NOW + 5),
)


@given(wishes, wishes)
def test_what_a_key_makes_is_within_it(first: Wish, second: Wish) -> None:
    assume(first.budget_period is None or first.budget_tokens is not None)
    maker = minted(msgspec_free(first, scopes=(first.scopes or frozenset()) | {"admin"}))
    try:
        made = minted(second, Actor(maker.id, maker))
    except Forbidden:
        return
    except InvalidParameter:
        assert first.budget_tokens is second.budget_tokens is None, "only a period without a budget is refused"
        return
    assert made.scopes <= maker.scopes
    assert not maker.models or (made.models and set(made.models) <= set(maker.models))
    assert maker.all_tenants or (made.tenant == maker.tenant and not made.all_tenants)
    assert maker.expires_at is None or (made.expires_at is not None and made.expires_at <= maker.expires_at)
    for name in ("rpm", "tpm", "concurrency", "budget_tokens"):
        most, value = getattr(maker.limits, name), getattr(made.limits, name)
        assert most is None or (value is not None and value <= most)
    if maker.limits.budget_tokens is not None:
        assert made.limits.budget_period == maker.limits.budget_period


def msgspec_free(wish: Wish, **changes: Any) -> Wish:
    return Wish(**{name: getattr(wish, name) for name in Wish.__slots__} | changes)


def test_what_is_left_open_is_inherited() -> None:
    maker = admin(tenant="acme", models=("a",), rpm=3, budget_tokens=9, budget_period="day", expires_at=NOW + 9)
    made = minted(Wish(name="k"), maker)
    assert (made.tenant, made.models, made.scopes, made.expires_at) == ("acme", ("a",), {"inference"}, NOW + 9)
    assert made.limits == LimitSpec(rpm=3, budget_tokens=9, budget_period="day")
    assert made.created_by == maker.name


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        (Wish(name="k", tenant="other"), "tenant"),
        (Wish(name="k", scopes=frozenset({"usage"})), "scopes"),
        (Wish(name="k", models=("a", "b")), "models"),
        (Wish(name="k", rpm=4), "rpm"),
        (Wish(name="k", budget_period="total"), "budget_period"),
        (Wish(name="k", expires_at=NOW + 10), "expires"),
    ],
)
def test_what_is_broader_is_refused_by_name(wish: Wish, param: str) -> None:
    maker = admin(tenant="acme", models=("a",), rpm=3, budget_tokens=9, budget_period="day", expires_at=NOW + 9)
    with pytest.raises(Forbidden) as refused:
        minted(wish, maker)
    assert refused.value.param == param


def test_keys_for_no_tenant_are_tenants_of_their_own() -> None:
    one, two = minted(Wish(name="a")), minted(Wish(name="a"))
    assert one.tenant == one.id != two.tenant
    assert not one.all_tenants


@pytest.mark.parametrize("wish", [Wish(name=""), Wish(name="a\nb"), Wish(name="x" * 129), Wish(name="a", tenant=" "), Wish(name="a", rpm=0),
                                  Wish(name="a", budget_tokens=1, budget_period="week"),
                                  Wish(name="a", budget_period="day"), Wish(name="a", expires_at=NOW)])  # fmt: skip
def test_nonsense_is_refused(wish: Wish) -> None:
    with pytest.raises(InvalidParameter):
        minted(wish)


@pytest.mark.anyio
async def test_a_tenants_administrator_stays_within_it() -> None:
    keys = MemoryKeys()
    desk = KeyDesk(keys, keys, b"p" * 32)
    everywhere = Actor("x", (await desk.create(Wish(name="super", scopes=frozenset({"admin"})), OPERATOR))[0])
    acme = Actor("y", (await desk.create(Wish(name="acme", tenant="acme", scopes=frozenset({"inference", "admin"})), OPERATOR))[0])
    foreign, _ = await desk.create(Wish(name="foreign", tenant="other"), OPERATOR)
    own, _ = await desk.create(Wish(name="own"), acme)
    broader, _ = await desk.create(Wish(name="broader", tenant="acme", scopes=frozenset({"usage"})), OPERATOR)
    assert everywhere.everywhere
    assert not acme.everywhere
    assert {key.name for key in await desk.keys(acme)} == {"acme", "own", "broader"}
    assert len(await desk.keys(everywhere)) == 5
    for attempt in (desk.key, desk.revoke, desk.rotate):
        with pytest.raises(NotFound):
            await attempt(foreign.id, acme)  # type: ignore[operator]
    with pytest.raises(Forbidden):
        await desk.rotate(broader.id, acme)
    with pytest.raises(Forbidden):
        await desk.put_tenant("acme", {"rpm": 9}, acme)
    assert [tenant.name for tenant in await desk.tenants(acme)] == ["acme"]
    assert (await desk.revoke(own.id, acme)).revoked_at is not None
    assert {entry.tenant for entry in await desk.audit(acme)} == {"acme"}
    assert [entry.action for entry in await desk.audit(everywhere)][-1] == "key.revoke"
    assert (await desk.audit(everywhere))[-1].actor == "y"


def test_records_keep_no_more_than_asked() -> None:
    assert msgspec.structs.asdict(minted(Wish(name="a")))["limits"] == LimitSpec()
