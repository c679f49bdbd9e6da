"""An application whose keys a test makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serving_echo import Stand, stand

from headrace.config import AccessSection, Config
from headrace.http.api import create_api
from headrace.journey import Journey
from headrace.policies.callers import Callers
from headrace.policies.key_desk import KeyDesk
from headrace.policies.mint import Actor, Wish
from headrace.ports import Ledger
from headrace.served import ServedModels
from headrace.stores.memory_keys import MemoryKeys


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


def house(ledger: Ledger | None = None, **access: Any) -> House:
    made = stand(keys=False)
    keys, pepper = MemoryKeys(), b"p" * 32
    config = Config(access=AccessSection(**access))
    callers, desk = Callers(config.access, keys, pepper), KeyDesk(keys, keys, pepper)
    models = ServedModels([made.served])
    journey = Journey.standard(config, models, callers=callers)
    app = create_api(config, models, journey, control=made.control, callers=callers, desk=desk, ledger=ledger)
    return House(Stand(app, made.engine, made.served, made.control), desk, keys)
