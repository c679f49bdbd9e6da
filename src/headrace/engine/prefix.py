"""Names for prefixes: the key of a full block depends on its tokens, on all before them, and on the tenant.

Keys are keyed BLAKE2b digests under a secret of this process, so that no tenant can find or construct another's,
and equal keys mean equal tokens as surely as a hash can say it.
"""

from __future__ import annotations

import os
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray


class PrefixKeys:
    """Chains of block keys. A chain holds one key for each full block of a token sequence."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._secret = os.urandom(32)

    def root(self, tenant: int) -> bytes:
        """What a tenant's chains begin with; the salt that keeps tenants' caches apart."""
        return blake2b(str(tenant).encode(), digest_size=16, key=self._secret).digest()

    def extend(self, chain: list[bytes], root: bytes, tokens: NDArray[np.int64], length: int) -> None:
        """Add the keys of the blocks that `tokens[:length]` fills beyond those in `chain`."""
        size = self._block_size
        parent = chain[-1] if chain else root
        for begin in range(len(chain) * size, length - size + 1, size):
            parent = blake2b(parent + tokens[begin : begin + size].tobytes(), digest_size=16, key=self._secret).digest()
            chain.append(parent)
