"""A line in which the higher rank goes first, and within a rank the tenants take turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairLine(Generic[Item]):
    """What waits for an engine that has no scheduler of its own."""

    def __init__(self) -> None:
        self._ranks: dict[int, dict[int, deque[Item]]] = {}
        """By rank and tenant; the tenant whose turn it is comes first."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, item: Item, *, rank: int, tenant: int) -> None:
        self._ranks.setdefault(rank, {}).setdefault(tenant, deque()).append(item)
        self._count += 1

    def firsts(self) -> Iterator[tuple[int, Item]]:
        """Each tenant and its next one, left where it is, in the order of their turns; of the highest rank alone."""
        if self._ranks:
            for tenant, line in self._ranks[max(self._ranks)].items():
                yield tenant, line[0]

    def take(self, tenant: int | None = None) -> Item:
        """The next one, or that tenant's next of the highest rank.

        Raises `ValueError` where nothing waits, `KeyError` where that tenant has nothing there.
        """
        rank = max(self._ranks)
        tenants = self._ranks[rank]
        if tenant is None:
            tenant = next(iter(tenants))
        line = tenants.pop(tenant)
        item = line.popleft()
        if line:
            tenants[tenant] = line  # behind the others
        elif not tenants:
            del self._ranks[rank]
        self._count -= 1
        return item

    def discard(self, item: Item, *, rank: int, tenant: int) -> None:
        """Forget one that waits there; nobody's turn changes."""
        line = self._ranks.get(rank, {}).get(tenant)
        if line is None or item not in line:
            return
        line.remove(item)
        self._count -= 1
        if not line:
            del self._ranks[rank][tenant]
            if not self._ranks[rank]:
                del self._ranks[rank]

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Forget what isn't wanted."""
        for rank, tenants in [*self._ranks.items()]:
            for tenant, line in [*tenants.items()]:
                kept = deque(item for item in line if wanted(item))
                self._count -= len(line) - len(kept)
                if kept:
                    tenants[tenant] = kept
                else:
                    del tenants[tenant]
            if not tenants:
                del self._ranks[rank]
