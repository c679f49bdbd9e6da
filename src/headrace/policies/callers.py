"""Who calls, and may they? A key from the configuration or the store, or an anonymous caller by address."""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from hashlib import blake2b, sha256

from headrace.config import AccessSection
from headrace.errors import Forbidden, Unauthorized
from headrace.policies.bad_keys import BadKeys
from headrace.policies.key_secret import Digest, looks_like_secret
from headrace.policies.known_keys import MOST_KNOWN, KnownKeys
from headrace.policies.operator_pass import is_operator
from headrace.ports import Keys
from headrace.records import Caller, KeyRecord, KnownKey, Scope, TenantRecord

_SEND = "send it as `Authorization: Bearer KEY`"


class Callers:
    """Finds callers by their bearer token.

    While keys are optional (`auth` isn't `keys`) an unknown token is ignored, because clients send dummies; one that is known counts, with
    its scopes, and one that is expired or revoked is refused.
    """

    def __init__(
        self, access: AccessSection, keys: Keys | None = None, pepper: bytes = b"", *, on_met: Callable[[bytes], None] | None = None
    ) -> None:
        """`on_met` is told the digest of each key that a request made known here, for other API processes (`meet`)."""
        self.key_required = access.auth == "keys"
        self._configured = [_configured(key.get_secret_value()) for key in access.api_keys]
        self._known = KnownKeys(keys, access.key_cache_ttl, on_met=on_met) if keys is not None else None
        self._pepper = pepper
        self._digest = Digest(pepper)
        self._met: dict[bytes, tuple[KnownKey, Caller]] = {}
        """By digest, as long as the key is known in the very same words."""
        self._bad = BadKeys()

    def quick(self, token: str | None, address: str, scope: Scope, *, required: bool) -> Caller | None:
        """The caller, where nothing has to be waited for; else None, and `admit` finds out.

        Raises `Unauthorized` and `Forbidden` as `admit`.
        """
        required = required or self.key_required
        if token is None:
            if required:
                raise Unauthorized(self._without(scope))
            return anonymous(address)
        found = self._by_configuration(token)
        if found is None and self._known is not None and looks_like_secret(token):
            digest = self._digest(token)
            known = self._known.get(digest)
            if known is None:
                return None
            found = self._caller(digest, known)
        if found is not None:
            return _checked(found, scope)
        return None if required else anonymous(address)

    async def admit(self, token: str | None, address: str, scope: Scope, *, required: bool) -> Caller:
        """The caller, who may use `scope`.

        Raises `Unauthorized` where a key is required and no good one was sent, and for one that is expired or revoked; `Forbidden`
        where the key doesn't have the scope; `RateLimited` for too many bad keys from one address; `StoreUnavailable` where an unknown
        key can't be looked up.
        """
        found = self.quick(token, address, scope, required=required)
        if found is not None:
            return found
        assert token is not None, "a caller without a token is never looked up"
        if self._known is not None and looks_like_secret(token):
            digest = self._digest(token)
            async with self._bad.lookup(address):
                known = await self._known.find(digest)
            if known is not None:
                return _checked(self._caller(digest, known), scope)
        if required or self.key_required or looks_like_secret(token):
            await self._bad.note(address)
        if required or self.key_required:
            raise Unauthorized(self._unknown())
        return anonymous(address)

    def meet(self, digest: bytes) -> None:
        """A key is in use in another API process."""
        if self._known is not None:
            self._known.meet(digest)

    def is_operator(self, token: str | None) -> bool:
        """Whether one of the operator's own commands asks, which has read the pepper."""
        return is_operator(token, self._pepper, time.time())

    def _by_configuration(self, token: str) -> Caller | None:
        if not self._configured:
            return None
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for caller in self._configured:
            # Digests have one length, so that comparing them takes one time.
            if hmac.compare_digest(caller.key.digest if caller.key is not None else b"", digest):
                found = caller
        return found

    def _caller(self, digest: bytes, known: KnownKey) -> Caller:
        met = self._met.get(digest)
        if met is None or met[0] is not known:
            if len(self._met) >= MOST_KNOWN:
                self._met.clear()
            met = self._met[digest] = known, _caller(known)
        return met[1]

    def _without(self, scope: Scope) -> str:
        if scope == "admin":
            return f"This route needs a key with scope `admin`: {_SEND}. `headrace keys create --scopes admin` makes one."
        if not self._configured and self._known is None:
            return "This route needs a key, and the server has none configured (HEADRACE_API_KEYS)."
        return f"This route needs a key: {_SEND}."

    def _unknown(self) -> str:
        if not self._configured and self._known is None:
            return "This route needs a key, and the server has none configured (HEADRACE_API_KEYS)."
        return "The key is not one that this server knows."


@lru_cache(maxsize=4096)
def anonymous(address: str) -> Caller:
    return Caller(number=tenant_number("address", address.encode()))


def tenant_number(kind: str, identity: bytes) -> int:
    """An opaque number that is the same in every API process: 63 bits, never 0."""
    digest = blake2b(identity, digest_size=8, person=kind.encode())
    return (int.from_bytes(digest.digest()) >> 1) or 1


def _configured(secret: str) -> Caller:
    """A key from the configuration: a tenant of its own, without limits, for inference and its own usage."""
    digest = sha256(secret.encode()).digest()
    name = digest.hex()[:8]
    key = KeyRecord(
        id=name, name="configured", prefix="", digest=digest, tenant=f"configured-{name}", scopes=frozenset({"inference", "usage"})
    )
    return Caller(number=tenant_number("key", digest), key=key, tenant=TenantRecord(name=key.tenant))


def _caller(known: KnownKey) -> Caller:
    return Caller(number=_number(known.tenant.name), key=known.key, tenant=known.tenant)


def _number(tenant: str) -> int:
    return tenant_number("tenant", tenant.encode())


def _checked(caller: Caller, scope: Scope) -> Caller:
    key = caller.key
    assert key is not None
    if key.revoked_at is not None:
        raise Unauthorized(f"This key ({key.prefix}…) was revoked.")
    if key.expires_at is not None and key.expires_at <= time.time():
        when = datetime.fromtimestamp(key.expires_at, UTC).isoformat(timespec="seconds")
        raise Unauthorized(f"This key ({key.prefix}…) expired at {when}.")
    if scope not in key.scopes:
        raise Forbidden(f"This key doesn't have the scope `{scope}`; it has {', '.join(sorted(key.scopes)) or 'none'}.")
    return caller
