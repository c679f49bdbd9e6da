"""What a route asks of its callers, before anything else is done for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope as AsgiScope

from headrace.errors import Forbidden
from headrace.http.client_address import is_loopback
from headrace.http.exchange import Exchange
from headrace.policies.callers import Callers, anonymous
from headrace.types import Caller, Scope


@dataclass(frozen=True, slots=True)
class Gate:
    """Stands before a route; it belongs to the route itself, so that no path can be written that goes around it."""

    callers: Callers
    scope: Scope
    always: bool = False
    """A key is needed even where keys are optional."""
    also: Scope | None = None
    """Another scope that will do."""
    local: bool = False
    """Commands of the operator, on this machine and not through a proxy, need none: they have read the pepper."""
    shown: bool = False
    """With `local`, and where keys are optional: nobody on this machine needs one."""

    async def admit(self, exchange: Exchange, scope: AsgiScope) -> None:
        """Sets `exchange.caller`. Raises as `Callers.admit`."""
        if self.local and not exchange.forwarded:
            client: Any = scope.get("client")
            known = (self.shown and not self.callers.key_required) or self.callers.is_operator(exchange.token)
            if known and client and is_loopback(client[0]):
                exchange.caller = anonymous(exchange.address)
                return
        try:
            exchange.caller = await self._admit(exchange, self.scope)
        except Forbidden:
            if self.also is None:
                raise
            exchange.caller = await self._admit(exchange, self.also)

    async def _admit(self, exchange: Exchange, scope: Scope) -> Caller:
        token, address = exchange.token, exchange.address
        caller = self.callers.quick(token, address, scope, required=self.always)
        return caller or await self.callers.admit(token, address, scope, required=self.always)
