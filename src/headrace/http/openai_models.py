"""`GET /v1/models` and `GET /v1/models/{id}`."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from headrace.http.answers import Answer, json_answer
from headrace.http.exchange import exchange_of
from headrace.http.serving import Serving
from headrace.policies.authorize import may_use
from headrace.served import ServedModel


class Models:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def list(self, request: Request) -> Answer:
        """The models served here that the caller may use, under every name they have."""
        caller = exchange_of(request.scope).caller
        key = caller.key if caller is not None else None
        models = self._serving.models
        names = {name: served for served in models for name in served.names}
        # What a name without a version stands for changes.
        names |= models.names()
        data = [_entry(served, name) for name, served in names.items() if may_use(key, served, name)]
        return json_answer({"object": "list", "data": data})

    async def retrieve(self, request: Request) -> Answer:
        """One model."""
        name: str = request.path_params["model"]
        return json_answer(_entry(self._serving.find(exchange_of(request.scope), name), name))


def _entry(served: ServedModel, name: str) -> dict[str, Any]:
    context = served.card.context_length if served.card is not None else served.files.context_length
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "headrace",
        "context_length": context or None,
        "state": served.status.state,
    }
