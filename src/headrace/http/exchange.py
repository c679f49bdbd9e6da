"""One HTTP request and its answer, as the edge, the routes and the log share it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from headrace.call import Call
from headrace.http.client_address import TrustedProxies
from headrace.records import Caller

if TYPE_CHECKING:
    from starlette.types import Scope, Send

    from headrace.http.line import Line

NO_ROUTE = "(none)"
CLIENT_ID_LENGTH = 128
"""Longest `X-Client-Request-Id` that is echoed and logged."""


@dataclass(slots=True)
class Exchange:
    id: str
    """The request id, ours."""
    method: str
    address: str
    """The client's, after trusted proxies."""
    forwarded: bool
    """A proxy's header was there, trusted or not."""
    token: str | None = None
    """The bearer token as sent, never logged."""
    client_id: str | None = None
    content_type: bytes = b""
    cache_control: str = ""
    timeout: str | None = None
    """X-Request-Timeout, as sent."""
    priority: str | None = None
    """X-Headrace-Priority, as sent."""
    content_length: int | None = None
    """As announced; None where nothing was, or nonsense."""
    openai: bool = False
    """Errors are told in OpenAI's words."""
    route: str = NO_ROUTE
    """The matched route's path."""
    status: int = 0
    """What was answered; 0 until then."""
    gone: bool = False
    """The client hung up first."""
    send: Send | None = None
    """The server's own `send`. Once an answer has begun the pieces of its body need no layer of ours."""
    line: Line | None = None
    """The connection, where it is one of ours."""
    caller: Caller | None = None
    """Who the route's gate let in; None on routes without a gate."""
    late_headers: Callable[[], dict[str, str]] | None = None
    """As a call's: how the caller's limits stand."""
    items: int | None = None
    """Of a batch: requests that it is."""
    calls: list[Call] = field(default_factory=list)
    error: Exception | None = None
    """What ended the request, where it was an error; that of a call may be another one."""
    started_at: float = field(default_factory=time.monotonic)


def exchange_of(scope: Scope) -> Exchange:
    found: Exchange = scope["headrace"]
    return found


_FORWARDING = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto", b"x-real-ip", b"via"})


def open_exchange(scope: Scope, proxies: TrustedProxies) -> Exchange:
    """Read what the headers say, in one pass."""
    client: Any = scope.get("client")
    peer: str = client[0] if client else ""
    path: str = scope["path"]
    exchange = Exchange(
        id="req_" + os.urandom(16).hex(),
        method=scope["method"],
        address=peer,
        forwarded=False,
        openai=path.startswith("/v1/") or path == "/v1",
    )
    hops: list[bytes] = []
    for name, value in scope["headers"]:
        if name == b"authorization":
            exchange.token = bearer(value)
        elif name == b"content-type":
            exchange.content_type = value
        elif name == b"content-length":
            exchange.content_length = int(value) if value.isdigit() and len(value) < 19 else None
        elif name == b"x-request-timeout":
            exchange.timeout = value.decode("latin-1")
        elif name == b"x-headrace-priority":
            exchange.priority = value.decode("latin-1")
        elif name == b"x-client-request-id":
            exchange.client_id = printable(value)
        elif name == b"cache-control":
            said = value.decode("latin-1")
            exchange.cache_control = f"{exchange.cache_control},{said}" if exchange.cache_control else said
        elif name in _FORWARDING:
            exchange.forwarded = True
            if name == b"x-forwarded-for":
                hops.append(value)
    if hops:
        exchange.address = proxies.client(peer, b",".join(hops).decode("latin-1"))
    return exchange


def bearer(value: bytes) -> str | None:
    """The token of an Authorization header; None for other schemes and for nothing."""
    scheme, _, token = value.partition(b" ")
    if scheme.lower() != b"bearer":
        return None
    return token.strip().decode("utf-8", "surrogateescape") or None


def printable(value: bytes) -> str | None:
    if 0 < len(value) <= CLIENT_ID_LENGTH and all(0x20 <= byte < 0x7F for byte in value):
        return value.decode("ascii")
    return None
