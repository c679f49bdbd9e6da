"""For whom a call counts: its key and its tenant, or else its address."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

from headrace.call import Call
from headrace.claims import Claim, claim_of, parse_rate
from headrace.records import Caller, KeyRecord, TenantRecord

BEYOND_LOOPBACK = "10/minute"
"""Anonymous callers' limit on a server that others can reach, unless the configuration says otherwise; the tutorial's."""
IPV6_NETWORK = 64
"""Bits of an IPv6 address that are one caller: a household has that many addresses to itself."""
MOST_KEPT = 4096
"""Callers of whom what is worked out is kept at hand."""


class Claimants:
    """`anonymous_limit`: as configured, `N/second|minute|hour|day`; `none` is no limit, None the default of `beyond_loopback`."""

    def __init__(self, anonymous_limit: str | None, *, beyond_loopback: bool) -> None:
        if anonymous_limit is None:
            anonymous_limit = BEYOND_LOOPBACK if beyond_loopback else "none"
        self._anonymous = None if anonymous_limit == "none" else parse_rate(anonymous_limit)
        self._kept: dict[str, tuple[KeyRecord, TenantRecord | None, tuple[Claim, ...]]] = {}
        """By key. They hold for these very records: a changed key or tenant comes as another one."""

    @property
    def limits_anonymous(self) -> bool:
        return self._anonymous is not None

    def claims(self, call: Call) -> tuple[Claim, ...]:
        """Those with a limit, the narrowest first; none for most callers."""
        if call.caller is None:
            return () if call.key is not None else self._of_address(call.address)
        return self._of_key(call.caller, call.caller_tenant)

    def claims_of(self, caller: Caller, address: str) -> tuple[Claim, ...]:
        """Those of a caller of whose request no call was made."""
        return self._of_address(address) if caller.key is None else self._of_key(caller.key, caller.tenant)

    def _of_address(self, address: str) -> tuple[Claim, ...]:
        if self._anonymous is None:
            return ()
        requests, window = self._anonymous
        return (Claim(f"address:{network_of(address)}", requests=requests, window=window),)

    def _of_key(self, key: KeyRecord, tenant: TenantRecord | None) -> tuple[Claim, ...]:
        kept = self._kept.get(key.id)
        if kept is None or kept[0] is not key or kept[1] is not tenant:
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            kept = self._kept[key.id] = key, tenant, claims_of(key, tenant)
        return kept[2]


def claims_of(key: KeyRecord, tenant: TenantRecord | None) -> tuple[Claim, ...]:
    claims = [claim_of(f"key:{key.id}", key.limits)]
    if tenant is not None:
        claims.append(claim_of(f"tenant:{tenant.name}", tenant.limits))
    return tuple(claim for claim in claims if claim.limited)


@lru_cache(maxsize=MOST_KEPT)
def network_of(address: str) -> str:
    """What is one anonymous caller: an IPv4 address, or an IPv6 network."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ip_network((parsed, IPV6_NETWORK), strict=False))
    return str(parsed)
