from __future__ import annotations

import pytest
from pydantic import SecretStr

from headrace.config import AccessSection
from headrace.errors import Unauthorized
from headrace.policies.identify import Identify, tenant_number
from headrace.types import Call, Sampling


def call(token: str | None, *, address: str = "192.0.2.7", key_required: bool = False) -> Call:
    return Call(id="r", route="/chat", model=None, sampling=Sampling(max_tokens=1), token=token, address=address, key_required=key_required)


def identified(identify: Identify, call: Call) -> Call:
    identify.identify(call)
    return call


KEYS = Identify(AccessSection(api_keys=(SecretStr("alpha"), SecretStr("beta"))))


def test_each_key_is_a_tenant_wherever_it_calls_from() -> None:
    alpha = identified(KEYS, call("alpha", address="192.0.2.1"))
    again = identified(KEYS, call("alpha", address="192.0.2.2"))
    beta = identified(KEYS, call("beta", address="192.0.2.1"))
    assert alpha.tenant == again.tenant != beta.tenant
    assert alpha.key is not None
    assert "alpha" not in alpha.key


@pytest.mark.parametrize("token", [None, "", "dummy", "\udcff", "x" * 100_000])
def test_unknown_tokens_are_anonymous_by_address(token: str | None) -> None:
    here = identified(KEYS, call(token))
    there = identified(KEYS, call(token, address="192.0.2.8"))
    assert here.key is None
    assert here.tenant == identified(KEYS, call(None)).tenant != there.tenant


@pytest.mark.parametrize("token", [None, "", "alph", "alpha ", "ALPHA"])
def test_a_required_key_must_be_known(token: str | None) -> None:
    with pytest.raises(Unauthorized):
        KEYS.identify(call(token, key_required=True))
    KEYS.identify(call("beta", key_required=True))


def test_without_configured_keys_a_required_key_is_never_there() -> None:
    with pytest.raises(Unauthorized, match="HEADRACE_API_KEYS"):
        Identify(AccessSection()).identify(call("alpha", key_required=True))


def test_tenant_numbers_fit_a_signed_64_bit_integer_and_tell_kinds_apart() -> None:
    assert tenant_number("key", b"a") != tenant_number("address", b"a")
    assert all(0 < tenant_number("key", bytes([i])) < 2**63 for i in range(256))
