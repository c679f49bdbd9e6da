"""`/admin/cache`: how full the response cache is, and purges, for keys with scope `admin`."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
from starlette.requests import Request

from headrace.errors import Forbidden, InvalidParameter, ModelNotFound, UnknownField
from headrace.http.answers import Answer, json_answer
from headrace.http.exchange import exchange_of
from headrace.served import ServedModels
from headrace.stores.cache_levels import CacheLevels

TAGS = ("tenant", "model", "key")


class AdminCache:
    """`levels` is None where the cache is off: then there is nothing to tell, and nothing to purge."""

    def __init__(self, levels: CacheLevels | None, models: ServedModels) -> None:
        self._levels = levels
        self._models = models

    async def stats(self, request: Request) -> Answer:
        """How full each level is, and what this API process has looked up."""
        tenant = _reach(request)
        if tenant is not None:
            raise Forbidden("The cache's figures are over all tenants; your key administers only its own.")
        if self._levels is None:
            return json_answer({"response_cache": "off", "levels": {}, "process": {}})
        levels: dict[str, Any] = {
            name: None if size is None else msgspec.to_builtins(size) for name, size in (await self._levels.sizes()).items()
        }
        return json_answer({"response_cache": "on", "levels": levels, "process": msgspec.to_builtins(self._levels.counts)})

    async def purge(self, request: Request) -> Answer:
        """Drop kept answers: those of `?tenant=`, `?model=` and `?key=` (a key's id) together, or all. `{"purged": number}`."""
        for name in request.query_params:
            if name not in TAGS:
                raise UnknownField(f"There is no parameter {name[:100]!r}; there is {', '.join(TAGS)}.", param=name[:100])
        wanted = {name: request.query_params[name] for name in TAGS if name in request.query_params}
        for name, value in wanted.items():
            if not value:
                # Whoever meant one tenant must not lose all because a variable was empty.
                raise InvalidParameter(f"{name} is empty; leave it out to mean any.", param=name)
        tenant = _reach(request)
        if tenant is not None and wanted.setdefault("tenant", tenant) != tenant:
            raise Forbidden("Your key administers only its own tenant.")
        if "model" in wanted:
            # Answers of a model that is served no longer can be purged by the name it had.
            with contextlib.suppress(ModelNotFound):
                wanted["model"] = self._models.find(wanted["model"]).files.name
        purged = await self._levels.purge(**wanted) if self._levels is not None else 0
        return json_answer({"purged": purged})


def _reach(request: Request) -> str | None:
    """The one tenant that the caller may administer; None is all."""
    caller = exchange_of(request.scope).caller
    key = caller.key if caller is not None else None
    return None if key is None or key.all_tenants else key.tenant
