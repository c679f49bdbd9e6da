"""A server with several API processes: equal requests are answered once, whichever processes they reach."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from running_server import RunningServer, eventually
from test_metrics_served import value

pytestmark = [pytest.mark.anyio, pytest.mark.slow]


@asynccontextmanager
async def of_each_process(server: RunningServer, each: int) -> AsyncIterator[dict[int, list[httpx.AsyncClient]]]:
    """By process, so many clients whose connections end there."""
    found: dict[int, list[httpx.AsyncClient]] = {line["pid"]: [] for line in server.ps()["api"]}
    async with AsyncExitStack() as clients:
        while min(map(len, found.values())) < each:

            async def connected() -> tuple[str, httpx.AsyncClient]:
                client = await clients.enter_async_context(httpx.AsyncClient(base_url=server.url, timeout=30, trust_env=False))
                # Those who are busy leave connections to others.
                answer = await client.post("/chat", json={"prompt": "hello there", "max_length": 8, "cache": False})
                return answer.headers["x-request-id"], client

            ids = dict(await asyncio.gather(*(connected() for _ in range(8))))
            for id, client in ids.items():
                line = await asyncio.to_thread(
                    eventually, lambda id=id: next((line for line in server.events("request") if line["request_id"] == id), None)
                )
                found[line["pid"]].append(client)
        yield found


async def say(client: httpx.AsyncClient, text: str, **more: Any) -> tuple[str, int, int]:
    """What the cache had, and the tokens of the answer and, of the prompt's, those that weren't computed."""
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0} | more
    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    usage = answer.json()["usage"]
    return answer.headers["x-headrace-cache"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


async def test_equal_requests_are_answered_once_over_all_processes(tmp_path: Path) -> None:
    environment = {"HEADRACE_RESPONSE_CACHE": "on", "MAX_WORKERS": "2"}
    with RunningServer(tmp_path, "echo?pace=0.02", environment=environment) as server:
        async with of_each_process(server, 2) as found:
            first, second = found
            one, two = found[first][0], found[second][0]
            everyone = [client for clients in found.values() for client in clients]

            async def generated() -> float:
                return value((await one.get("/metrics")).text, "headrace_engine_completion_tokens_total")

            before = await generated()
            said = await asyncio.gather(*(say(client, "one two three four five") for client in everyone))
            assert sorted(had for had, _, _ in said) == ["hit"] * (len(everyone) - 1) + ["miss"]
            assert await generated() == before + said[0][1]
            assert {tokens for _, tokens, _ in said} == {said[0][1]}

            for seed in range(4):
                assert (await say(one, "six seven", temperature=1, seed=seed))[0] == "miss"
                assert (await say(two, "six seven", temperature=1, seed=seed))[0] == "hit"

            # Each token is on one bill.
            made = await generated()

            def billed() -> bool:
                lines = server.client.get("/admin/usage").raise_for_status().json()["usage"]
                return sum(line["completion_tokens"] for line in lines) == made

            await asyncio.to_thread(eventually, billed, what="the bill")

            # The process that makes the answer dies: the other makes it.
            async def under_way(count: int) -> None:
                async with asyncio.timeout(20):
                    while value((await two.get("/metrics")).text, "headrace_requests_in_flight") != count + 1:
                        pass

            dies = asyncio.create_task(say(one, "eight nine ten eleven twelve thirteen"))
            await under_way(1)
            lives = asyncio.create_task(say(found[second][1], "eight nine ten eleven twelve thirteen"))
            await under_way(2)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                await dies
            assert (await lives)[0] == "miss"
