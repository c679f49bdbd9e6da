"""What a route asks of its callers, before anything else is done for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope as AsgiScope

from headrace.http.client_address import is_loopback
from headrace.http.exchange import Exchange
from headrace.policies.callers import Callers, anonymous
from headrace.types import Scope


@dataclass(frozen=True, slots=True)
class Gate:
    """Stands before a route; it belongs to the route itself, so that no path can be written that goes around it."""

    callers: Callers
    scope: Scope
    always: bool = False
    """A key is needed even where keys are optional."""
    local: bool = False
    """Where keys are optional, callers on this machine need none, unless they came through a proxy."""

    async def admit(self, exchange: Exchange, scope: AsgiScope) -> None:
        """Sets `exchange.caller`. Raises as `Callers.admit`."""
        if self.local and not self.callers.key_required and not exchange.forwarded:
            client: Any = scope.get("client")
            if client and is_loopback(client[0]):
                exchange.caller = anonymous(exchange.address)
                return
        token, address = exchange.token, exchange.address
        caller = self.callers.quick(token, address, self.scope, required=self.always)
        exchange.caller = caller or await self.callers.admit(token, address, self.scope, required=self.always)
