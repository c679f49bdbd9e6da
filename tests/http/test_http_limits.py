"""A caller over its limit is refused before it is read, and what is wrong with a request doesn't make it free."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from http_access_stand import House, house
from serving_echo import client

pytestmark = pytest.mark.anyio

GOOD: dict[str, Any] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "x", "max_tokens": 4},
    "/chat": {"prompt": "x"},
    "/chat/stream": {"prompt": "x"},
    "/chat/secure": {"prompt": "x"},
    "/chat/batch": [{"prompt": "x"}],
}
ITEM = {"prompt": "x"}


async def keyed(rpm: int, **wish: Any) -> tuple[House, dict[str, str]]:
    made = house()
    return made, {"Authorization": f"Bearer {await made.key('k', {'inference'}, rpm=rpm, **wish)}"}


def left(answer: httpx.Response) -> int:
    return int(answer.headers["x-ratelimit-remaining-requests"])


@pytest.mark.parametrize("path", GOOD)
async def test_an_empty_bucket_is_refused_before_the_body_is_read(path: str) -> None:
    made, headers = await keyed(1)
    async with client(made.stand) as http:
        assert left(await http.post(path, json=GOOD[path], headers=headers)) == 0

    async def receive() -> Any:
        raise AssertionError("the body is read")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "scheme": "http",
        "client": ("127.0.0.1", 1),
        "headers": [(b"authorization", headers["Authorization"].encode()), (b"content-length", b"8000000")],
    }
    await made.stand.app(scope, receive, send)
    told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert sent[0]["status"] == 429
    assert 55 <= int(told["retry-after"]) <= 60
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("1", "0")
    said = json.loads(sent[1]["body"])
    assert (said["error"] if path.startswith("/v1") else said)["code"] == "rate_limited"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"", 400),
        ("/v1/chat/completions", {**GOOD["/v1/chat/completions"], "temperature": 9}, 400),
        ("/v1/chat/completions", {**GOOD["/v1/chat/completions"], "model": "nope"}, 404),
        ("/v1/chat/completions", {**GOOD["/v1/chat/completions"], "model": "nope", "stream": True}, 404),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5000}]}, 400),
        ("/v1/completions", {"prompt": [1, "x"]}, 400),
        ("/v1/completions", {"prompt": "x", "model": "nope"}, 404),
        ("/chat", {"prompt": 1}, 422),
        ("/chat/stream", {"prompt": "x", "model": "nope"}, 404),
        ("/chat/secure", b"x" * (9 << 20), 413),
        ("/chat/batch", b"{}", 422),
    ],
)
async def test_what_is_wrong_counts_as_a_request(path: str, body: Any, status: int) -> None:
    made, headers = await keyed(2)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with client(made.stand) as http:
        answers = [await http.post(path, content=content, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [status, status, 429]
    assert [left(answer) for answer in answers] == [1, 0, 0]


async def test_every_item_of_a_batch_counts_once_whatever_becomes_of_it() -> None:
    made, headers = await keyed(9)
    async with client(made.stand) as http:
        batch = [ITEM, {"prompt": 1}, {"prompt": "x", "model": "nope"}, ITEM, {}]
        answer = await http.post("/chat/batch", json=batch, headers=headers)
        assert ["error" in result for result in answer.json()["results"]] == [False, True, True, False, True]
        assert left(answer) == 4
        assert left(await http.post("/chat/batch", json=[{"prompt": 1}], headers=headers)) == 3
        assert left(await http.post("/chat/batch", json=[], headers=headers)) == 3
        assert left(await http.post("/v1/completions", json={"prompt": ["x" * 5000] * 2}, headers=headers)) == 1
        assert left(await http.post("/v1/completions", json={"prompt": ["a", "b"], "model": "nope"}, headers=headers)) == 0


async def test_anonymous_callers_pay_for_what_is_wrong_by_their_address() -> None:
    made = house(anonymous="3/minute")
    async with client(made.stand, "198.51.100.1") as http:
        statuses = [(await http.post("/chat", content=b"{")).status_code for _ in range(4)]
        assert statuses == [422, 422, 422, 429]
    async with client(made.stand, "198.51.100.2") as http:
        assert left(await http.post("/chat/batch", json=[ITEM, {}])) == 1


async def test_what_is_good_is_taken_once() -> None:
    made, headers = await keyed(3)
    async with client(made.stand) as http:
        assert [left(await http.post("/chat", json=ITEM, headers=headers)) for _ in range(3)] == [2, 1, 0]
        refused = await http.post("/chat", json=ITEM, headers=headers)
    assert refused.status_code == 429


async def test_what_is_no_fault_of_the_caller_is_not_counted() -> None:
    made, headers = await keyed(2)
    async with client(made.stand) as http:
        made.stand.control.refusing = True
        busy = await http.post("/chat", json=ITEM, headers=headers)
        assert (busy.status_code, left(busy)) == (503, 2)
        made.stand.control.refusing = False
        for _ in range(3):
            seen = await http.get("/v1/models", headers=headers)
            assert (seen.status_code, left(seen)) == (200, 2)


async def test_a_mistake_holds_no_place_of_those_at_a_time_and_costs_no_tokens() -> None:
    made, headers = await keyed(100, concurrency=1, tpm=1000)
    async with client(made.stand) as http:
        for _ in range(3):
            answer = await http.post("/chat", content=b"{", headers=headers)
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-tokens"]) == (422, "1000")
        assert (await http.post("/chat", json=ITEM, headers=headers)).status_code == 200
