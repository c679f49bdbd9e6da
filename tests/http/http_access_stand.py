"""An application whose keys a test makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving_echo import Stand, stand

from headrace.claims import Ask, Reply
from headrace.config import AccessSection, Config
from headrace.http.api import create_api
from headrace.journey import Journey
from headrace.policies.callers import Callers
from headrace.policies.claimants import Claimants
from headrace.policies.key_desk import KeyDesk
from headrace.policies.limit_requests import LimitRequests
from headrace.policies.mint import Actor, Wish
from headrace.ports import Ledger
from headrace.served import ServedModels
from headrace.stores.limit_table import LimitTable
from headrace.stores.memory_keys import MemoryKeys
from headrace.stores.shared_limits import SharedLimits


class TableLimits:
    """Where limits are kept, in this process."""

    def __init__(self) -> None:
        self.table = LimitTable()

    async def exchange(self, asks: Sequence[Ask]) -> list[Reply]:
        return [self.table.answer(ask) for ask in asks]

    async def tell(self, asks: Sequence[Ask]) -> None: ...

    async def reconnect(self) -> None: ...

    async def close(self) -> None: ...


@dataclass
class House:
    stand: Stand
    desk: KeyDesk
    keys: MemoryKeys
    ids: dict[str, str] = field(default_factory=dict)

    async def key(self, name: str, scopes: set[str], **wish: Any) -> str:
        """A new key's secret."""
        record, secret = await self.desk.create(Wish(name=name, scopes=frozenset(scopes), **wish), Actor("cli:ada"))  # type: ignore[arg-type]
        self.ids[name] = record.id
        return secret


def house(ledger: Ledger | None = None, *, anonymous: str = "none", **access: Any) -> House:
    """`anonymous`: the limit of callers without a key."""
    made = stand(keys=False)
    keys, pepper = MemoryKeys(), b"p" * 32
    config = Config(access=AccessSection(**access))
    callers, desk = Callers(config.access, keys, pepper), KeyDesk(keys, keys, pepper)
    models = ServedModels([made.served])
    limits, claimants = SharedLimits(TableLimits()), Claimants(anonymous, beyond_loopback=False)
    journey = Journey.standard(config, models, callers=callers, limits=limits, claimants=claimants)
    looks = LimitRequests(claimants, limits)
    app = create_api(config, models, journey, control=made.control, callers=callers, desk=desk, ledger=ledger, limits=looks)
    return House(Stand(app, made.engine, made.served, made.control), desk, keys)
