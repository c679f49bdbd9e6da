"""What a route asks of its callers, before anything else is done for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.types import Scope as AsgiScope

from headrace.errors import Forbidden, HeadraceError, RateLimited
from headrace.http.client_address import is_loopback
from headrace.http.exchange import Exchange
from headrace.http.hangup import ClientGone
from headrace.policies.callers import Callers, anonymous
from headrace.policies.limit_requests import LimitRequests
from headrace.records import Caller, Scope


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
    limits: LimitRequests | None = None
    """They are shown on every answer."""
    counted: bool = False
    """What comes here is a request by the caller's limits."""

    async def admit(self, exchange: Exchange, scope: AsgiScope) -> None:
        """Sets `exchange.caller`. Raises as `Callers.admit`, and `RateLimited` where requests are counted and certainly none is left."""
        await self._identify(exchange, scope)
        if self.limits is not None:
            self.limits.look(exchange, refuse=self.counted)

    async def count(self, exchange: Exchange) -> None:
        """A request that is over, or of a batch those that are: count what nobody has counted and is its caller's fault. Else what is
        wrong were free, however much of it there is."""
        if self.limits is not None and self.counted and (times := in_vain(exchange)):
            for call in exchange.calls:
                call.counted, call.late_headers = True, None
            exchange.items = len(exchange.calls)
            await self.limits.count(exchange, times)

    async def _identify(self, exchange: Exchange, scope: AsgiScope) -> None:
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


def in_vain(exchange: Exchange) -> int:
    """Requests of an exchange that came to nothing by their caller's fault, before a limit had counted them."""
    if not _blamed(exchange.error):
        return 0
    calls = exchange.calls
    items = 1 if exchange.items is None else exchange.items
    return max(0, items - len(calls)) + sum(not call.counted and _blamed(call.outcome.error) for call in calls)


def _blamed(error: BaseException | None) -> bool:
    """Whether it is the caller's fault. A hang-up is, and leaves no error where it ended the request by itself."""
    if isinstance(error, HeadraceError):
        return error.status < 500 and not isinstance(error, RateLimited)
    return not isinstance(error, Exception) or isinstance(error, ClientGone)
