"""Is it well? For people, load balancers and probes."""

from __future__ import annotations

import time
from typing import Any, Literal

from starlette.requests import Request

from headrace import __version__
from headrace.http.answers import Answer, json_answer
from headrace.http.serving import Serving
from headrace.policies.route import candidate
from headrace.served import ServedModel

Health = Literal["healthy", "starting", "unhealthy"]


class HealthRoutes:
    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def health(self, request: Request) -> Answer:
        """200 when requests are served; 503 with `starting` or `unhealthy`, and why."""
        state, reason = self.state()
        models = self._serving.models
        body: dict[str, Any] = {
            "status": state,
            "service": "headrace",
            "version": __version__,
            "model": models.default.public_name,
            "uptime_seconds": round(max(0.0, time.monotonic() - self._serving.control.started_at), 3),
            "models": [
                {
                    "name": served.public_name,
                    "state": served.status.state,
                    "restarts": served.status.restarts,
                    "circuit": served.circuit,
                }
                for served in models
            ],
        }
        if reason:
            body["reason"] = reason
        return json_answer(body, status=200 if state == "healthy" else 503)

    async def live(self, request: Request) -> Answer:
        """200 as long as this process answers: a restart would help nothing."""
        return json_answer({"status": "alive"})

    async def ready(self, request: Request) -> Answer:
        """200 when requests are served at once, 503 while the engine starts, restarts or drains. Where only fallbacks serve them it says
        so."""
        state, reason = self.state()
        if state == "healthy":
            return json_answer({"status": "ready", "reason": reason} if reason else {"status": "ready"})
        return json_answer({"status": "not ready", "reason": reason}, status=503)

    async def startup(self, request: Request) -> Answer:
        """200 from when the model was ready for the first time."""
        state, reason = self.state()
        if self._serving.models.default.card is not None or state == "healthy":
            return json_answer({"status": "started"})
        return json_answer({"status": "starting", "reason": reason}, status=503)

    def _others_answer(self, served: ServedModel) -> bool:
        """Whether a fallback of that model is there for everybody."""
        chains, models = self._serving.config.resilience.fallbacks, self._serving.models
        chain = next((chains[name] for name in (*served.names, served.family) if name in chains), ())
        others = [each for each in map(candidate, chain) if each.kind != "cache"]
        return any(each.kind == "canned" or models.find(each.text).status.state == "ready" for each in others)

    def state(self) -> tuple[Health, str]:
        """Overall health, and why it isn't better."""
        if self._serving.control.draining:
            return "unhealthy", "The server is shutting down."
        # What others are for, fallbacks and the like, may be away without harm.
        served = self._serving.models.default
        status = served.status
        if served.files.kind == "remote" and status.state == "failed" and self._others_answer(served):
            return "healthy", f"{served.public_name} is away, and its fallbacks answer: {status.reason}"
        if status.state == "ready" or (served.card is not None and status.state in ("absent", "loading")):
            return "healthy", ""  # one that was unloaded for want of requests is loaded again for the next
        first = served.card is None and status.state in ("absent", "loading", "starting", "standby") and status.restarts == 0
        reason = status.reason or f"The engine is {status.state}."
        return ("starting" if first else "unhealthy"), f"{served.public_name}: {reason}"
