"""`/admin/keys`, `/admin/tenants`, `/admin/audit`: what `headrace keys`, `tenants` and `audit` do, for keys with scope `admin`."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from starlette.requests import Request

from headrace.errors import Forbidden, InvalidParameter
from headrace.http.admin_wire import NewKey, NewTenant, Rotation, TenantLimits, moment_of, seconds_of
from headrace.http.answers import Answer, json_answer
from headrace.http.body import decode_json, read_body
from headrace.http.exchange import exchange_of
from headrace.http.native_wire import validated
from headrace.policies.key_desk import KeyDesk, public, public_tenant
from headrace.policies.mint import Actor, Wish
from headrace.records import KeyRecord

_PRIVATE = [(b"cache-control", b"no-store")]
MOST_ENTRIES = 10_000


class AdminKeys:
    def __init__(self, desk: KeyDesk, body_limit: int) -> None:
        self._desk = desk
        self._body_limit = body_limit

    async def list(self, request: Request) -> Answer:
        """The keys within reach, without their secrets."""
        return json_answer({"keys": [public(key) for key in await self._desk.keys(_actor(request))]})

    async def create(self, request: Request) -> Answer:
        """A new key, with its secret, which is never shown again."""
        asked = validated(NewKey, await self._body(request))
        wish = Wish(
            name=asked.name,
            tenant=asked.tenant,
            models=tuple(asked.models or ()),
            scopes=frozenset(asked.scopes) if asked.scopes is not None else None,
            rpm=asked.rpm,
            tpm=asked.tpm,
            concurrency=asked.concurrency,
            budget_tokens=asked.budget_tokens,
            budget_period=asked.budget_period,
            priority=asked.priority,
            expires_at=moment_of(asked.expires, time.time()) if asked.expires is not None else None,
        )
        return _with_secret(*await self._desk.create(wish, _actor(request)), status=201)

    async def show(self, request: Request) -> Answer:
        """One key."""
        return json_answer(public(await self._desk.key(request.path_params["id"], _actor(request))))

    async def revoke(self, request: Request) -> Answer:
        """End a key, for good and everywhere within a second."""
        return json_answer(public(await self._desk.revoke(request.path_params["id"], _actor(request))))

    async def rotate(self, request: Request) -> Answer:
        """A new secret; the old one ends at once, or after `grace` seconds."""
        asked = validated(Rotation, await self._body(request) or {})
        return _with_secret(*await self._desk.rotate(request.path_params["id"], _actor(request), grace=asked.grace))

    async def tenants(self, request: Request) -> Answer:
        """The tenants within reach, with their limits."""
        return json_answer({"tenants": [public_tenant(tenant) for tenant in await self._desk.tenants(_actor(request))]})

    async def tenant(self, request: Request) -> Answer:
        """One tenant."""
        return json_answer(public_tenant(await self._desk.tenant(request.path_params["name"], _actor(request))))

    async def create_tenant(self, request: Request) -> Answer:
        """A new tenant, or other limits for one that is there."""
        asked = validated(NewTenant, await self._body(request))
        return await self._put(request, asked.name.strip(), asked, status=201)

    async def set_tenant(self, request: Request) -> Answer:
        """Other limits for a tenant; those left out stay, null takes one away."""
        actor = _actor(request)
        name: str = request.path_params["name"]
        asked = validated(TenantLimits, await self._body(request))
        await self._desk.tenant(name, actor)
        return await self._put(request, name, asked)

    async def audit(self, request: Request) -> Answer:
        """The audit log's newest entries within reach, oldest first: `?since=` (a time, or a duration back), `?limit=`."""
        since = request.query_params.get("since")
        limit = request.query_params.get("limit", "1000")
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= MOST_ENTRIES:
            raise InvalidParameter(f"limit is 1 to {MOST_ENTRIES}.", param="limit")
        entries = await self._desk.audit(_actor(request), since=since_of(since) if since else 0.0, limit=int(limit))
        return json_answer({"entries": msgspec.to_builtins(entries)})

    async def _put(self, request: Request, name: str, asked: TenantLimits, *, status: int = 200) -> Answer:
        changes: dict[str, Any] = {field: getattr(asked, field) for field in asked.model_fields_set - {"name"}}
        return json_answer(public_tenant(await self._desk.put_tenant(name, changes, _actor(request))), status=status)

    async def _body(self, request: Request) -> Any:
        """What was sent, None where nothing was."""
        exchange = exchange_of(request.scope)
        if not exchange.content_length and "transfer-encoding" not in request.headers:
            return None
        return decode_json(await read_body(exchange, request.receive, self._body_limit))


def since_of(text: str) -> float:
    """Unix time of a moment, or of so long ago. Raises `InvalidParameter`."""
    try:
        return time.time() - seconds_of(text)
    except ValueError:
        pass
    try:
        return moment_of(float(text) if text.replace(".", "", 1).isdecimal() else text, 0.0)
    except ValueError as error:
        raise InvalidParameter(f"since: {error}.", param="since") from None


def _actor(request: Request) -> Actor:
    caller = exchange_of(request.scope).caller
    if caller is None or caller.key is None:
        raise Forbidden("This route needs a key with scope `admin`.")
    return Actor(caller.key.id, caller.key)


def _with_secret(record: KeyRecord, secret: str, *, status: int = 200) -> Answer:
    return json_answer({**public(record), "secret": secret}, status=status, headers=_PRIVATE)
