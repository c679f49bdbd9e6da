"""`GET /admin/errors`: what went wrong of late, by fingerprint, for keys with scope `admin` over all tenants."""

from __future__ import annotations

import msgspec
from starlette.requests import Request

from headrace.errors import Forbidden, InvalidParameter, NotFound, UnknownField
from headrace.http.admin_keys import since_of
from headrace.http.answers import Answer, json_answer
from headrace.http.exchange import exchange_of
from headrace.ports import ErrorBook

MOST_ERRORS = 1000
_KNOWN = ("limit", "since")


class AdminErrors:
    """`book` is None where none is kept: then there is nothing at this path."""

    def __init__(self, book: ErrorBook | None) -> None:
        self._book = book

    async def list(self, request: Request) -> Answer:
        """The last distinct errors with their counts, last seen first: `?limit=`, `?since=` (a time, or a duration back)."""
        caller = exchange_of(request.scope).caller
        if caller is None or caller.key is None or not caller.key.all_tenants:
            raise Forbidden("Errors are over all tenants; your key administers only its own.")
        if self._book is None:
            raise NotFound("This server keeps no list of errors.")
        given = request.query_params
        for name in given:
            if name not in _KNOWN:
                raise UnknownField(f"There is no parameter {name[:100]!r}; there is {', '.join(_KNOWN)}.", param=name[:100])
        limit = given.get("limit", "100")
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit[:9]) <= MOST_ERRORS:
            raise InvalidParameter(f"limit is 1 to {MOST_ERRORS}.", param="limit")
        since = given.get("since")
        errors = await self._book.newest(limit=int(limit), since=since_of(since) if since else 0.0)
        return json_answer({"errors": msgspec.to_builtins(errors)})
