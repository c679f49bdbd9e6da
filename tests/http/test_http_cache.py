"""The response cache over HTTP: both dialects, streams and whole answers, purges, and real servers."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_echo import EVERYTHING, KEY, ScriptedEngine, Stand, client, live, stand
from strict_sse import parse

from headrace.config import AccessSection, CacheSection, Config
from headrace.http.api import create_api
from headrace.journey import Journey
from headrace.policies.callers import Callers
from headrace.policies.key_desk import KeyDesk
from headrace.policies.operator_pass import operator_pass
from headrace.served import ServedModels
from headrace.stores.cache_open import open_cache
from headrace.stores.memory_keys import MemoryKeys
from headrace.types import Delta, Event, GenerateRequest, Report, TokenLogprob
from real_servers import RedisServer
from running_server import RunningServer, eventually

pytestmark = pytest.mark.anyio

assert "logprobs" in EVERYTHING


class Numbered(ScriptedEngine):
    """No two generations are alike, so that an answer that comes again can only have been kept."""

    def __init__(self, words: int = 40) -> None:
        super().__init__(self._say)
        self._words = words

    async def _say(self, request: GenerateRequest) -> Any:
        number = len(self.requests)
        n = request.sampling.n
        for index in range(self._words):
            last = index == self._words - 1
            text = f"{number}.{index}é\n "
            scored = (TokenLogprob(65, -0.25, text, text.encode(), ()),) if request.sampling.logprobs is not None else ()
            batch: list[Event] = [Delta(c, index, (65,), f"{c}:{text}", "stop" if last else None, None, scored) for c in range(n)]
            yield batch
            await asyncio.sleep(0)
        yield [Report(len(request.prompt), 0, n * self._words, 1.0, 2.0, 3.0)]


def cached_stand(engine: Any = None, *, keys: bool = False, **cache: Any) -> Stand:
    made = stand(engine or Numbered(), keys=keys)
    access = AccessSection(api_keys=(KEY, KEY + "-2") if keys else ())  # type: ignore[arg-type]
    config = Config(access=access, cache=CacheSection(cache_url="memory://", **cache))
    models = ServedModels([made.served])
    levels, keys_at_hand = open_cache(config), MemoryKeys()
    journey = Journey.standard(config, models, answers=levels)
    callers, desk = Callers(config.access, keys_at_hand, PEPPER), KeyDesk(keys_at_hand, keys_at_hand, PEPPER)
    made.app = create_api(config, models, journey, control=made.control, cache=levels, callers=callers, desk=desk)
    return made


PEPPER = b"p" * 32
CHAT = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


def chunks(text: bytes) -> list[dict[str, Any]]:
    return [json.loads(data) for _, data in parse(text).events if data != "[DONE]"]


def streamed(text: bytes, field: Callable[[dict[str, Any]], str]) -> dict[int, str]:
    out: dict[int, str] = {}
    for chunk in chunks(text):
        for choice in chunk["choices"]:
            out[choice["index"]] = out.get(choice["index"], "") + field(choice)
    return out


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"seed": 3, "temperature": 1.0}])
async def test_chat_is_the_same_again_streamed_and_whole(more: dict[str, Any]) -> None:
    made = cached_stand()
    async with client(made) as http:
        first = await http.post("/v1/chat/completions", json=CHAT | more)
        whole = await http.post("/v1/chat/completions", json=CHAT | more)
        stream = await http.post("/v1/chat/completions", json=CHAT | more | {"stream": True, "stream_options": {"include_usage": True}})
    assert [answer.headers["x-headrace-cache"] for answer in (first, whole, stream)] == ["miss", "hit", "hit"]
    assert whole.json()["choices"] == first.json()["choices"]
    texts = streamed(stream.content, lambda choice: choice["delta"].get("content") or "")
    assert texts == {choice["index"]: choice["message"]["content"] for choice in first.json()["choices"]}
    assert len(chunks(stream.content)) > 3
    if "logprobs" in more:
        scores = [
            entry
            for chunk in chunks(stream.content)
            for choice in chunk["choices"]
            for entry in (choice["logprobs"] or {}).get("content", ())
        ]
        assert scores == first.json()["choices"][0]["logprobs"]["content"]
    usage, again = first.json()["usage"], whole.json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
    assert again == usage | {"prompt_tokens_details": {"cached_tokens": usage["prompt_tokens"]}}
    assert chunks(stream.content)[-1]["usage"] == again
    assert whole.headers["server-timing"] == "queue;dur=0.0, prefill;dur=0.0, decode;dur=0.0"
    assert len(made.engine.requests) == 1


async def test_streamed_first_is_whole_again_on_every_route() -> None:
    made = cached_stand()
    async with client(made) as http:
        stream = await http.post("/v1/completions", json={"prompt": "x", "temperature": 0, "stream": True, "n": 2})
        whole = await http.post("/v1/completions", json={"prompt": "x", "temperature": 0, "n": 2})
        assert [stream.headers["x-headrace-cache"], whole.headers["x-headrace-cache"]] == ["miss", "hit"]
        texts = streamed(stream.content, lambda choice: choice["text"])
        assert texts == {choice["index"]: choice["text"] for choice in whole.json()["choices"]}

        native = await http.post("/chat/stream", json={"prompt": "y", "temperature": 0})
        again = await http.post("/chat", json={"prompt": "y", "temperature": 0})
        assert [native.headers["x-headrace-cache"], again.headers["x-headrace-cache"]] == ["miss", "hit"]
        # The stream's pieces of text, an event each; the last is the word that it is done.
        assert "".join(data for _, data in parse(native.content).events[:-1]) == again.json()["response"]

        questions = [{"prompt": "y", "temperature": 0}, {"prompt": "new", "temperature": 0}]
        batches = [await http.post("/chat/batch", json=questions) for _ in range(2)]
        assert [batch.headers["x-headrace-cache"] for batch in batches] == ["miss", "hit"]
        assert [item["response"] for item in batches[0].json()["results"]] == [item["response"] for item in batches[1].json()["results"]]
    assert len(made.engine.requests) == 3


async def test_who_does_not_want_the_cache_does_not_get_it() -> None:
    made = cached_stand()
    asks: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({}, {}, "miss"),
        ({"cache": False}, {}, "off"),
        ({}, {"cache-control": "no-store"}, "off"),
        ({}, {"cache-control": "no-cache"}, "miss"),
        ({"temperature": 0.5}, {}, "off"),
        ({"temperature": 0.5, "cache": True}, {}, "miss"),
        ({"temperature": 0.5, "cache": True}, {}, "hit"),
        ({}, {}, "hit"),
    ]
    async with client(made) as http:
        for path, base in (("/v1/chat/completions", CHAT), ("/chat", {"prompt": "hello", "temperature": 0})):
            said = [(await http.post(path, json=base | body, headers=headers)).headers["x-headrace-cache"] for body, headers, _ in asks]
            assert said == [expected for _, _, expected in asks]
        wrong = await http.post("/v1/chat/completions", json=CHAT | {"cache": "yes"})
        assert wrong.status_code == 400
        assert "cache" in wrong.text
    off = stand(Numbered(), keys=False)
    async with client(off) as http:
        assert [(await http.post("/chat", json={"prompt": "x", "temperature": 0})).headers["x-headrace-cache"] for _ in "12"] == ["off"] * 2


async def test_keys_and_addresses_are_tenants_apart() -> None:
    made = cached_stand(keys=True)

    async def ask(token: str | None, address: str = "127.0.0.1") -> str:
        async with client(made, address) as http:
            headers = {"authorization": f"Bearer {token}"} if token else {}
            answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
            assert answer.status_code == 200
            return answer.headers["x-headrace-cache"]

    assert [await ask(KEY), await ask(KEY + "-2"), await ask(None), await ask(None, "127.0.0.2")] == ["miss"] * 4
    assert [await ask(KEY), await ask(KEY + "-2"), await ask(None), await ask(None, "127.0.0.2")] == ["hit"] * 4


async def test_purges_and_figures() -> None:
    made = cached_stand()
    operator = {"Authorization": f"Bearer {operator_pass(PEPPER, time.time())}"}
    async with client(made) as http:
        await http.post("/v1/chat/completions", json=CHAT)
        figures = (await http.get("/admin/cache", headers=operator)).json()
        assert figures["levels"]["memory"]["entries"] == 1
        for query, purged in (("model=house&tenant=nobody", 0), ("model=house&tenant=anonymous", 1), ("", 0)):
            assert (await http.delete(f"/admin/cache?{query}", headers=operator)).json() == {"purged": purged}
        assert (await http.post("/v1/chat/completions", json=CHAT)).headers["x-headrace-cache"] == "miss"
        assert (await http.delete("/admin/cache?tenant=", headers=operator)).status_code == 400
        assert (await http.delete("/admin/cache?user=x", headers=operator)).status_code == 400
        assert (await http.post("/v1/chat/completions", json=CHAT)).headers["x-headrace-cache"] == "hit"
        counted = (await http.get("/metrics")).text
        assert 'headrace_response_cache_total{model="house",result="memory"} 1.0' in counted
        assert 'headrace_response_cache_total{model="house",result="miss"} 2.0' in counted
        assert 'headrace_completion_tokens_total{model="house"} 80.0' in counted
        assert (await http.get("/admin/cache")).status_code == 401
        late = {"Authorization": f"Bearer {operator_pass(PEPPER, time.time() - 90)}"}
        assert (await http.get("/admin/cache", headers=late)).status_code == 401
        proxied = await http.get("/admin/cache", headers=operator | {"X-Forwarded-For": "192.0.2.7"})
        assert proxied.status_code == 401
        others = {"Authorization": f"Bearer {operator_pass(b'q' * 32, time.time())}"}
        assert (await http.get("/admin/cache", headers=others)).status_code == 401
    async with client(made, "192.0.2.7") as http:
        assert (await http.delete("/admin/cache", headers=operator)).status_code == 401
        assert (await http.get("/admin/cache")).status_code == 401


class Held(Numbered):
    """Waits between its two words until it is let go on."""

    async def _say(self, request: GenerateRequest) -> Any:
        self.loop, self.gate = asyncio.get_running_loop(), asyncio.Event()
        yield [Delta(0, 0, (65,), "a")]
        await self.gate.wait()
        yield [Delta(0, 1, (66,), "b", "stop")]
        yield [Report(len(request.prompt), 0, 2, 1.0, 2.0, 3.0)]


@pytest.mark.slow
def test_a_client_that_hangs_up_hands_the_generation_to_the_next() -> None:
    engine = Held()
    made = cached_stand(engine)
    body = CHAT | {"stream": True}
    with live(made), httpx.Client(base_url=made.url, timeout=20) as http, http.stream("POST", "/v1/chat/completions", json=body) as first:
        assert first.headers["x-headrace-cache"] == "miss"
        with http.stream("POST", "/v1/chat/completions", json=body) as second:
            assert second.headers["x-headrace-cache"] == "hit"
            first.close()
            # The second stream, and this question.
            eventually(lambda: "headrace_requests_in_flight 2.0" in http.get("/metrics").text, what="the hang-up")
            assert not engine.closed.is_set()
            engine.loop.call_soon_threadsafe(engine.gate.set)
            said = b"".join(second.iter_raw())
    assert streamed(said, lambda choice: choice["delta"].get("content") or "") == {0: "ab"}
    assert len(engine.requests) == 1


@pytest.mark.slow
def test_several_processes_share_the_second_level_and_restarts_keep_it(tmp_path: Path) -> None:
    environment = {"HEADRACE_RESPONSE_CACHE": "on", "MAX_WORKERS": "2"}

    def uses(server: RunningServer, count: int) -> list[str]:
        """Each on a connection of its own, so that both processes answer some."""
        return [
            httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, trust_env=False).headers["x-headrace-cache"] for _ in range(count)
        ]

    with RunningServer(tmp_path, "echo", environment=environment) as server:
        assert uses(server, 1) == ["miss"]
        eventually(lambda: server.client.get("/admin/cache").json()["levels"]["sqlite"]["entries"] == 1, what="the write")
        assert uses(server, 12) == ["hit"] * 12
        purged = _headrace(server, "cache", "purge", "--tenant", "anonymous")
        assert purged == "1 answer purged.\n"
        eventually(lambda: "miss" in uses(server, 1), what="the purge")
        assert "sqlite: " in _headrace(server, "cache", "stats")
        eventually(lambda: uses(server, 8) == ["hit"] * 8, what="the answer in both processes")
    assert (tmp_path / "data" / "cache.db").stat().st_mode & 0o777 == 0o600
    with RunningServer(tmp_path, "echo", environment=environment) as server:
        assert uses(server, 1) == ["hit"]


def _headrace(server: RunningServer, *words: str) -> str:
    import subprocess

    done = subprocess.run(
        [sys.executable, "-m", "headrace", *words, "--url", server.url], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_redis_that_stops_never_breaks_a_request(tmp_path: Path) -> None:
    with RedisServer() as redis:
        environment = {
            "HEADRACE_RESPONSE_CACHE": "on",
            "HEADRACE_CACHE_URL": redis.url,
            "HEADRACE_CACHE_ENCRYPTION_KEY": "a secret of ours, long",
        }
        with RunningServer(tmp_path, "echo", environment=environment) as server:
            body = [CHAT | {"messages": [{"role": "user", "content": f"number {n}"}]} for n in range(3)]
            ask = lambda n: server.client.post("/v1/chat/completions", json=body[n])  # noqa: E731
            assert [ask(0).headers["x-headrace-cache"] for _ in "12"] == ["miss", "hit"]
            redis.stop()
            answers = [ask(1), ask(1), ask(2), ask(0)]
            assert [answer.status_code for answer in answers] == [200] * 4
            assert [answer.headers["x-headrace-cache"] for answer in answers] == ["miss", "hit", "miss", "hit"]
            assert server.client.delete("/admin/cache").status_code == 503


def test_an_impossible_cache_stops_the_start(tmp_path: Path) -> None:
    import subprocess

    environment = RunningServer(tmp_path).environment | {"HEADRACE_RESPONSE_CACHE": "on", "HEADRACE_CACHE_URL": "mongo://x"}
    command = [sys.executable, "-m", "headrace", "serve", "echo", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert "cache_url" in done.stderr
