from __future__ import annotations

import pytest
from pydantic import SecretStr

from headrace.call import ANONYMOUS, Call
from headrace.config import AccessSection
from headrace.errors import Unauthorized
from headrace.policies.callers import Callers, tenant_number
from headrace.policies.identify import Identify
from headrace.types import Sampling

pytestmark = pytest.mark.anyio


def call(token: str | None, *, address: str = "192.0.2.7", key_required: bool = False) -> Call:
    return Call(id="r", route="/chat", model=None, sampling=Sampling(max_tokens=1), token=token, address=address, key_required=key_required)


async def identified(identify: Identify, call: Call) -> Call:
    async with identify(call):
        return call


def keys() -> Identify:
    return Identify(Callers(AccessSection(api_keys=(SecretStr("alpha"), SecretStr("beta")))))


async def test_each_key_is_a_tenant_wherever_it_calls_from() -> None:
    alpha = await identified(keys(), call("alpha", address="192.0.2.1"))
    again = await identified(keys(), call("alpha", address="192.0.2.2"))
    beta = await identified(keys(), call("beta", address="192.0.2.1"))
    assert alpha.tenant == again.tenant != beta.tenant
    assert alpha.subject_tenant == again.subject_tenant != beta.subject_tenant
    assert alpha.key is not None
    assert alpha.caller is not None
    assert alpha.caller.models == ()
    assert "alpha" not in alpha.key


@pytest.mark.parametrize("token", [None, "", "dummy", "\udcff", "x" * 100_000])
async def test_unknown_tokens_are_anonymous_by_address(token: str | None) -> None:
    here = await identified(keys(), call(token))
    there = await identified(keys(), call(token, address="192.0.2.8"))
    assert here.key is here.caller is None
    assert here.subject_tenant == ANONYMOUS
    assert here.tenant == (await identified(keys(), call(None))).tenant != there.tenant


@pytest.mark.parametrize("token", [None, "", "alph", "alpha ", "ALPHA"])
async def test_a_required_key_must_be_known(token: str | None) -> None:
    with pytest.raises(Unauthorized):
        await keys().identify(call(token, key_required=True))
    await keys().identify(call("beta", key_required=True))


async def test_without_configured_keys_a_required_key_is_never_there() -> None:
    with pytest.raises(Unauthorized, match="HEADRACE_API_KEYS"):
        await Identify(Callers(AccessSection())).identify(call("alpha", key_required=True))


async def test_who_was_identified_at_the_gate_is_not_asked_again() -> None:
    known = call(None, key_required=True)
    known.identified = True
    known.tenant = 7
    assert (await identified(keys(), known)).tenant == 7


def test_tenant_numbers_fit_a_signed_64_bit_integer_and_tell_kinds_apart() -> None:
    assert tenant_number("key", b"a") != tenant_number("address", b"a")
    assert all(0 < tenant_number("key", bytes([i])) < 2**63 for i in range(256))
