"""`GET /usage`, a key's own bill, and `GET /admin/usage`, everybody's; as JSON or CSV."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from headrace.errors import Forbidden, HeadraceError, InvalidParameter, NotFound, UnknownField
from headrace.http.admin_keys import since_of
from headrace.http.answers import Answer, Whole, json_answer
from headrace.http.exchange import exchange_of
from headrace.policies.bill import as_csv, as_json, groups_of
from headrace.ports import Ledger
from headrace.records import UsageQuery

_PRIVATE = [(b"cache-control", b"no-store")]
_OWN = ("group_by", "since", "until", "model", "format")
_ALL = (*_OWN, "key", "tenant")


class UsageRoutes:
    """`ledger` is None where none is kept: then there is nothing at these paths."""

    def __init__(self, ledger: Ledger | None) -> None:
        self._ledger = ledger

    async def own(self, request: Request) -> Answer:
        """What the caller's key has used, by `?group_by=day,model`.

        `model`, `since` and `until` (a date, or `7d` ago) choose what is added up; `format=csv` gives CSV.
        """
        caller = exchange_of(request.scope).caller
        if caller is None or caller.key is None:
            raise Forbidden("This route tells a key what it has used.")
        return await self._answer(request, _OWN, {"key": caller.key.id})

    async def all(self, request: Request) -> Answer:
        """What was used, by `?group_by=` key, tenant, model, day (several with commas); `key`, `tenant` and `model` choose, too.

        A key that administers only its own tenant sees only that.
        """
        caller = exchange_of(request.scope).caller
        key = caller.key if caller is not None else None
        reach: dict[str, str] = {}
        if key is not None and not key.all_tenants:
            if request.query_params.get("tenant", key.tenant) != key.tenant:
                raise Forbidden("Your key administers only its own tenant.")
            reach["tenant"] = key.tenant
        return await self._answer(request, _ALL, reach)

    async def _answer(self, request: Request, known: tuple[str, ...], reach: dict[str, str]) -> Answer:
        if self._ledger is None:
            raise NotFound("This server keeps no ledger (ledger = off).")
        query = _query(request, known, reach)
        shape = request.query_params.get("format")
        if shape not in (None, "json", "csv"):
            raise InvalidParameter("format is json or csv.", param="format")
        lines = await self._ledger.usage(query)
        accept = request.headers.get("accept", "")
        if shape == "csv" or (shape is None and accept.split(";")[0].split(",")[0].strip() == "text/csv"):
            return Whole(as_csv(query.group_by, lines).encode(), content_type=b"text/csv; charset=utf-8", headers=_PRIVATE)
        return json_answer({"usage": [as_json(line) for line in lines]}, headers=_PRIVATE)


def _query(request: Request, known: tuple[str, ...], reach: dict[str, str]) -> UsageQuery:
    """Raises `UnknownField` and `InvalidParameter`."""
    given = request.query_params
    for name in given:
        if name not in known:
            raise UnknownField(f"There is no parameter {name[:100]!r}; there is {', '.join(known)}.", param=name[:100])
    wanted: dict[str, Any] = {name: given[name] for name in ("key", "tenant", "model") if name in given} | reach
    for name in ("since", "until"):
        if name in given:
            wanted[name] = _moment(name, given[name])
    try:
        return UsageQuery(group_by=groups_of(given.get("group_by", "")), **wanted)
    except ValueError as error:
        raise InvalidParameter(f"group_by: {error}.", param="group_by") from None


def _moment(name: str, text: str) -> float:
    try:
        return since_of(text)
    except HeadraceError as error:
        raise InvalidParameter(error.message.replace("since", name, 1), param=name) from None
