"""A cache whose values are encrypted: AES-256-GCM, under keys that are derived from the operator's secret.

The names of the values are replaced too (a keyed hash), since whoever knows how they are made could try prompts out. Tags stay readable;
purges go by them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b, scrypt
from typing import Any

from headrace.ports import Cache, Sized
from headrace.records import CacheSize, CacheTags
from headrace.stores.cache_together import put_many

_SALT = b"headrace response cache 1"
"""The same everywhere: all servers that share a cache have to arrive at the same keys."""
_NONCE = 12
_MEMORY = 64 * 1024 * 1024


class SealedCache:
    """`ports.Cache` around another one. What another secret encrypted, or somebody changed, is as if it weren't there.

    Deriving the keys (scrypt, N = 2¹⁵, r = 8) takes about 0.1 s.
    """

    def __init__(self, inner: Cache, secret: str) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        derived = scrypt(secret.encode("utf-8", "surrogateescape"), salt=_SALT, n=2**15, r=8, p=1, maxmem=_MEMORY, dklen=64)
        self._inner = inner
        self._cipher: Any = AESGCM(derived[:32])
        self._names = derived[32:]

    async def get(self, key: bytes) -> bytes | None:
        from cryptography.exceptions import InvalidTag

        name = self._name(key)
        sealed = await self._inner.get(name)
        if sealed is None or len(sealed) <= _NONCE:
            return None
        try:
            opened: bytes = self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], name)
        except InvalidTag:
            return None
        return opened

    async def put(self, key: bytes, value: bytes, tags: CacheTags, ttl: float) -> None:
        await self.put_many([(key, value, tags)], ttl)

    async def put_many(self, values: Sequence[tuple[bytes, bytes, CacheTags]], ttl: float) -> None:
        await put_many(self._inner, [(*self._sealed(key, value), tags) for key, value, tags in values], ttl)

    async def purge(self, *, tenant: str | None = None, model: str | None = None, key: str | None = None) -> int:
        return await self._inner.purge(tenant=tenant, model=model, key=key)

    async def size(self) -> CacheSize:
        return await self._inner.size() if isinstance(self._inner, Sized) else CacheSize(0, None)

    async def close(self) -> None:
        await self._inner.close()

    def _sealed(self, key: bytes, value: bytes) -> tuple[bytes, bytes]:
        name = self._name(key)
        nonce = os.urandom(_NONCE)
        return name, nonce + self._cipher.encrypt(nonce, value, name)

    def _name(self, key: bytes) -> bytes:
        return blake2b(key, key=self._names, digest_size=32).digest()
