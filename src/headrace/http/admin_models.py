"""`GET /admin/models` and `/admin/models/{model}`, and `POST /admin/models/{model}/load`, `unload`, `promote`, `rollback`, for
`headrace models`."""

from __future__ import annotations

import math

from starlette.requests import Request

from headrace.control import ModelsAction
from headrace.errors import InvalidParameter, Unsupported
from headrace.http.answers import Answer, json_answer
from headrace.http.serving import ControlsModels, Serving
from headrace.http.whole_server import may_change_all


class AdminModels:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def list(self, request: Request) -> Answer:
        """All models with their state, what they take of the memory, and how their last upgrades went."""
        return json_answer(await self._control.models("list"))

    async def show(self, request: Request) -> Answer:
        """One of them: what the list says of it."""
        return json_answer(await self._control.models("show", request.path_params["model"]))

    async def load(self, request: Request) -> Answer:
        """Load a model now; answered when it is ready, or with 409 and the reason."""
        return await self._do(request, "load")

    async def unload(self, request: Request) -> Answer:
        """Unload a model once what runs is over. It is loaded again when it is asked for."""
        return await self._do(request, "unload")

    async def promote(self, request: Request) -> Answer:
        """Have a model's name stand for this version.

        Answered when the version has proved itself for `?watch=SECONDS`; or with 409 and the reason, when the old one is current after all.
        """
        return await self._do(request, "promote")

    async def rollback(self, request: Request) -> Answer:
        """Have a model's name stand for the version before."""
        return await self._do(request, "rollback")

    async def _do(self, request: Request, action: ModelsAction) -> Answer:
        may_change_all(request, "The models are")
        watch = None
        if (given := request.query_params.get("watch")) is not None:
            try:
                watch = float(given)
            except ValueError:
                watch = math.nan
            if not 0 <= watch <= 86_400:
                raise InvalidParameter("`watch` is a number of seconds, 0 to 86400.", param="watch")
        return json_answer(await self._control.models(action, request.path_params["model"], watch))

    @property
    def _control(self) -> ControlsModels:
        control = self._serving.control
        if not isinstance(control, ControlsModels):
            raise Unsupported("This server's models come and go with it.")
        return control
