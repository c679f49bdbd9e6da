"""Who calls: a configured key is a tenant of its own, everyone else is a tenant by address."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import blake2b, sha256

from headrace.config import AccessSection
from headrace.errors import Unauthorized
from headrace.types import Call


class Identify:
    """Sets `call.tenant` and `call.key`.

    While keys are optional an unknown token is ignored, because clients send dummies; a call with `key_required` raises `Unauthorized`.
    """

    def __init__(self, access: AccessSection) -> None:
        # Digests have one length, so that comparing them takes one time.
        self._digests = [sha256(key.get_secret_value().encode()).digest() for key in access.api_keys]

    @asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        self.identify(call)
        yield

    def identify(self, call: Call) -> None:
        """Raises `Unauthorized` where a key is required and none that we know was sent."""
        found = self._find(call.token) if call.token is not None and self._digests else None
        if found is not None:
            call.key = found.hex()[:8]
            call.tenant = tenant_number("key", found)
        elif call.key_required:
            raise Unauthorized(self._refusal(call.token))
        else:
            call.tenant = tenant_number("address", call.address.encode())

    def _find(self, token: str) -> bytes | None:
        digest = sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, digest):
                found = known
        return found

    def _refusal(self, token: str | None) -> str:
        if not self._digests:
            return "This route needs a key, and the server has none configured (HEADRACE_API_KEYS)."
        if token is None:
            return "This route needs a key: send it as `Authorization: Bearer KEY`."
        return "The key is not one that this server knows."


def tenant_number(kind: str, identity: bytes) -> int:
    """An opaque number that is the same in every API process: 63 bits, never 0."""
    digest = blake2b(identity, digest_size=8, person=kind.encode())
    return (int.from_bytes(digest.digest()) >> 1) or 1
