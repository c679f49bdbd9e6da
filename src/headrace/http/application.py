"""FastAPI, with our layers around its own."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp


class Application(FastAPI):
    """What `add_middleware` adds stands outside of FastAPI's own layers, not within them.

    Our routes are found, and their errors answered, before a request comes to those: nothing of theirs is in the way of a token.
    """

    def build_middleware_stack(self) -> ASGIApp:
        ours, self.user_middleware = self.user_middleware, []
        try:
            app = super().build_middleware_stack()
        finally:
            self.user_middleware = ours
        for cls, args, kwargs in reversed(ours):
            app = cls(app, *args, **kwargs)
        return app
