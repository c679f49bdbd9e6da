"""`GET /admin/ps`, for `headrace ps`."""

from __future__ import annotations

from starlette.requests import Request

from headrace.http.answers import Answer, json_answer
from headrace.http.serving import Serving


class Admin:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def ps(self, request: Request) -> Answer:
        """The server's processes."""
        return json_answer(await self._serving.control.ps())
