"""Who may change what belongs to all tenants."""

from __future__ import annotations

from starlette.requests import Request

from headrace.errors import Forbidden
from headrace.http.exchange import exchange_of


def may_change_all(request: Request, what: str) -> None:
    """Raises `Forbidden` for a key of one tenant, and for a web page. `what`: such as "The models are"."""
    caller = exchange_of(request.scope).caller
    key = caller.key if caller is not None else None
    if key is not None and not key.all_tenants:
        raise Forbidden(f"{what} every tenant's; your key administers only its own.")
    if key is None and "origin" in request.headers:
        # Where no key is needed on this machine, any web page could have its visitor's browser send this.
        raise Forbidden("Not from a web page, but with a key of scope `admin`.")
