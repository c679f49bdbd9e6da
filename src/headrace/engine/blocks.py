"""KV blocks: who holds them, what is cached in them, and which goes first when one is needed.

A block is in one of three places: held by one or more sequences (a reference count), idle (held by nobody, but
its keys and values are still good and can be found by their prefix), or free. Idle blocks are given up in the
order in which they were last used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Counts references to `num_blocks` blocks and finds full blocks by the key of the prefix that they end.

    With `caching` off nothing is ever found, and released blocks are free at once.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.caching = caching
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks

    @property
    def available(self) -> int:
        """Blocks that `take` can give out: free ones, and idle ones whose content is given up."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks held by sequences."""
        return self.num_blocks - len(self._free) - len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that can be found by their prefix, held or idle."""
        return len(self._block_of)

    def references(self, block: int) -> int:
        return self._references[block]

    def take(self) -> int:
        """A block to write to, held once. Raises `LookupError` where none is available."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        else:
            raise LookupError("no KV block is available")
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a block once more; an idle one is in use again."""
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Hold a block once less; with nobody left it is idle if it can be found, free otherwise."""
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        if self._key_of[block] is None:
            self._free.append(block)
        else:
            self._idle[block] = None

    def release_all(self, blocks: Sequence[int]) -> None:
        """Release a sequence's blocks, the last first: a prefix outlives what followed it."""
        for block in reversed(blocks):
            self.release(block)

    def register(self, block: int, key: bytes) -> None:
        """From now on a full block can be found by `key`. The first block with a key keeps it."""
        if self.caching and key not in self._block_of and self._key_of[block] is None:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The block whose prefix has this key; not held for the caller yet."""
        return self._block_of.get(key)

    def idle(self, block: int) -> bool:
        return block in self._idle

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
