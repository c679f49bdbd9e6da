"""What error tracking, the counters and the log are told of requests that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from http_access_stand import House
from serving_echo import ScriptedEngine, client, stand

from headrace.config import AccessSection, Config
from headrace.error_tracking import ErrorTracker, tracked
from headrace.errors import EngineDied, HeadraceError, Overloaded, RateLimited, UpstreamError
from headrace.http.api import create_api
from headrace.journey import Journey
from headrace.policies.callers import Callers
from headrace.policies.key_desk import KeyDesk
from headrace.ports import ErrorBook
from headrace.records import TrackedError
from headrace.served import ServedModels
from headrace.stores.database import Database
from headrace.stores.errors_sql import SqlErrors
from headrace.stores.memory_keys import MemoryKeys
from headrace.types import Delta, Event, GenerateRequest, Report

pytestmark = pytest.mark.anyio
PROMPT = "a prompt that is nobody's business"


class Broken:
    """A house whose engine fails as it is told, with an error tracker that a test can look into."""

    def __init__(self, error: Exception | None = None, *, after: int = 0, book: ErrorBook | None = None) -> None:
        async def script(request: GenerateRequest) -> AsyncIterator[list[Event]]:
            for number in range(after):
                yield [Delta(0, number, (65,), "A")]
            if error is not None:
                raise error
            yield [Delta(0, after, (), "", "stop"), Report(1, 0, after, 0.0, 0.0, 0.0)]

        self.told: list[TrackedError] = []
        self.tracker = ErrorTracker("api", self.told.extend)
        made = stand(ScriptedEngine(script), keys=False)
        config = Config(resilience={"retry_attempts": 2, "retry_budget": 1.0})  # type: ignore[arg-type]
        models = ServedModels([made.served])
        keys, pepper = MemoryKeys(), b"p" * 32
        callers, desk = Callers(AccessSection(), keys, pepper), KeyDesk(keys, keys, pepper)
        made.app = create_api(
            config,
            models,
            Journey.standard(config, models, callers=callers),
            control=made.control,
            callers=callers,
            desk=desk,
            errors=book,
            tracker=self.tracker,
        )
        self.house = House(made, desk, keys)

    async def ask(self, path: str = "/v1/completions", **more: Any) -> Any:
        async with client(self.house.stand) as http:
            answer = await http.post(path, json={"prompt": PROMPT, **more})
        self.tracker.flush()
        return answer

    async def counted(self, name: str) -> dict[str, float]:
        async with client(self.house.stand) as http:
            lines = (await http.get("/metrics")).text.splitlines()
        return {line.rpartition(" ")[0].removeprefix(name): float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")}


async def test_a_fault_of_ours() -> None:
    broken = Broken(RuntimeError(PROMPT))
    answer = await broken.ask()
    assert answer.status_code == 500
    error = broken.told[0]
    assert len(broken.told) == 1
    assert (error.process, error.code, error.kind) == ("api", "internal_error", "RuntimeError")
    assert (error.route, error.model, error.request_id) == ("/v1/completions", "house", answer.headers["x-request-id"])
    assert error.frames
    assert PROMPT not in repr(error)
    assert await broken.counted("headrace_errors_total") == {'{code="internal_error",model="house"}': 1.0}


async def test_a_stream_that_breaks_is_an_error_although_it_began_well() -> None:
    broken = Broken(EngineDied("The engine's process ended."), after=2)
    answer = await broken.ask(stream=True)
    assert answer.status_code == 200
    assert [(error.code, error.detail) for error in broken.told] == [("engine_died", "The engine's process ended.")]
    assert await broken.counted("headrace_errors_total") == {'{code="engine_died",model="house"}': 1.0}


async def test_an_upstreams_words_are_not_kept() -> None:
    broken = Broken(UpstreamError(f"The upstream says: {PROMPT}"))
    assert (await broken.ask()).status_code == 502
    assert broken.told[0].code == "upstream_error"
    assert PROMPT not in repr(broken.told)
    assert await broken.counted("headrace_retries_total") == {'{model="house"}': 2.0}


async def test_refusals_are_counted_and_nothing_more() -> None:
    broken = Broken(Overloaded("Too much to do."))
    assert (await broken.ask()).status_code == 503
    assert (await broken.ask(max_tokens=-1)).status_code == 400
    assert (await broken.ask(model="none")).status_code == 404
    assert (await broken.ask("/chat", prompt="")).status_code == 422
    refused = Broken(RateLimited("The upstream's limit."))
    assert (await refused.ask()).status_code == 429
    assert broken.told == refused.told == []
    counted = await broken.counted("headrace_errors_total")
    assert counted.pop('{code="overloaded",model="house"}') == 1.0
    assert sum(counted.values()) == 3.0
    assert await refused.counted("headrace_limit_refusals_total") == {}


async def test_each_item_of_a_batch_is_an_error_of_its_own() -> None:
    broken = Broken(HeadraceError("It broke."))
    async with client(broken.house.stand) as http:
        answer = await http.post("/chat/batch", json=[{"prompt": "a"}, {"prompt": "b"}])
    assert answer.status_code == 200
    broken.tracker.flush()
    assert [(error.route, error.count) for error in broken.told] == [("/chat/batch", 2)]
    assert sum((await broken.counted("headrace_errors_total")).values()) == 2.0


async def test_admins_of_all_tenants_read_the_book(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/headrace.db")
    await database.migrate()
    book = SqlErrors(database)
    await book.add([tracked("api", "old", at=10.0), tracked("engine", "new", at=2e9, detail="It was ended by SIGKILL.")])
    house = Broken(book=book).house
    admin = await house.key("a", {"admin"})
    of_a_tenant = await house.key("t", {"admin"}, tenant="acme")
    inference = await house.key("i", {"inference"})
    async with client(house.stand) as http:

        async def get(query: str = "", secret: str = admin) -> Any:
            return await http.get(f"/admin/errors{query}", headers={"Authorization": f"Bearer {secret}"})

        assert (await http.get("/admin/errors")).status_code == 401
        assert (await get(secret=inference)).status_code == 403
        assert (await get("?limit=0")).status_code == 400
        assert (await get("?last=1")).status_code == 400
        assert (await get(secret=of_a_tenant)).status_code == 403
        assert [error["code"] for error in (await get()).json()["errors"]] == ["new", "old"]
        assert [error["code"] for error in (await get("?since=1d&limit=1")).json()["errors"]] == ["new"]
    await database.close()
