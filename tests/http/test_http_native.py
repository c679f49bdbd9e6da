from __future__ import annotations

import json
from typing import Any

import pytest
from serving_echo import KEY, client, stand
from strict_sse import parse

pytestmark = pytest.mark.anyio


async def test_chat_answers_and_gives_pairs() -> None:
    async with client(stand()) as http:
        answer = await http.post("/chat", json={"prompt": "Hello\r\n\u2028you"})
    body = answer.json()
    assert answer.status_code == 200
    assert set(body) == {"response", "history", "tokens_used", "processing_time", "model", "finish_reason"}
    assert body["response"] == "Hello\r\n\u2028you"
    assert body["history"] == [["Hello\r\n\u2028you", "Hello\r\n\u2028you"]]
    assert body["model"] == "house"
    assert body["finish_reason"] == "stop"
    assert 0 < body["processing_time"] < 30
    assert body["tokens_used"] > 2 * len("Hello\r\n\u2028you")
    assert answer.headers["server-timing"].startswith("queue;dur=")


@pytest.mark.parametrize(
    "history",
    [
        [["Hi", "Yes?"]],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
    ],
)
async def test_history_comes_back_in_its_shape(history: list[Any]) -> None:
    made = stand()
    async with client(made) as http:
        body = (await http.post("/chat", json={"prompt": "Go", "history": history, "system": "Be brief."})).json()
        counted = await http.post(
            "/tokenize",
            json={
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Yes?"},
                    {"role": "user", "content": "Go"},
                ]
            },
        )
    turn = [["Go", "Go"]] if isinstance(history[0], list) else [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Go"}]
    assert body["history"] == history + turn
    assert body["tokens_used"] == counted.json()["count"] + len("Go")


async def test_max_length_is_cut_to_the_context_and_ends_with_length() -> None:
    async with client(stand()) as http:
        short = (await http.post("/chat", json={"prompt": "abcdef", "max_length": 3})).json()
        long = (await http.post("/chat", json={"prompt": "abcdef", "max_length": 1_000_000})).json()
    assert (short["response"], short["finish_reason"]) == ("abc", "length")
    assert (long["response"], long["finish_reason"]) == ("abcdef", "stop")


async def test_stop_and_seed_are_passed_on() -> None:
    async with client(stand()) as http:
        body = (await http.post("/chat", json={"prompt": "one two three", "stop": ["two"], "seed": 7, "top_p": 0.5})).json()
    assert body["response"] == "one "
    assert body["finish_reason"] == "stop"


async def test_stream_gives_pieces_and_says_done() -> None:
    text = "a\r\nb\n\nc: 漢字 😀\r"
    async with client(stand()) as http:
        answer = await http.post("/chat/stream", json={"prompt": text})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parsed = parse(answer.content)
    assert "".join(data for name, data in parsed.events if name == "message") == text.replace("\r\n", "\n").replace("\r", "\n")
    name, data = parsed.events[-1]
    assert name == "done"
    done = json.loads(data)
    assert done["finish_reason"] == "stop"
    assert done["tokens_used"] > len(text)
    assert done["processing_time"] > 0
    assert any(comment.startswith("queue;dur=") for comment in parsed.comments)


async def test_batch_keeps_order_and_keeps_errors_apart() -> None:
    questions: list[Any] = [
        {"prompt": "one"},
        {"prompt": ""},
        5,
        {"prompt": "x", "model": "no"},
        {"prompt": "y", "foo": 1},
        {"prompt": "two"},
    ]
    async with client(stand()) as http:
        answer = await http.post("/chat/batch", json=questions)
    results = answer.json()["results"]
    assert answer.status_code == 200
    assert [result.get("response") for result in results] == ["one", None, None, None, None, "two"]
    assert [result["error"]["status"] for result in results[1:5]] == [422, 422, 404, 422]
    assert results[1]["error"]["detail"][0]["loc"] == ["body", 1, "prompt"]
    assert "house" in results[3]["error"]["message"]
    assert "foo" in results[4]["error"]["message"]


async def test_batch_limits() -> None:
    async with client(stand(max_batch=2)) as http:
        empty = await http.post("/chat/batch", json=[])
        many = await http.post("/chat/batch", json=[{"prompt": "x"}] * 3)
        wrong = await http.post("/chat/batch", json={"prompt": "x"})
    assert empty.json() == {"results": []}
    assert many.status_code == 422
    assert "2" in many.json()["detail"][0]["msg"]
    assert "max_batch" in many.json()["detail"][0]["msg"]
    assert wrong.status_code == 422


async def test_secure_needs_a_known_key() -> None:
    async with client(stand()) as http:
        bare = await http.post("/chat/secure", json={"prompt": "x"})
        other = await http.post("/chat/secure", json={"prompt": "x"}, headers={"Authorization": "Basic " + KEY})
        wrong = await http.post("/chat/secure", json={"prompt": "x"}, headers={"Authorization": "Bearer no"})
        right = await http.post("/chat/secure", json={"prompt": "x"}, headers={"Authorization": "bearer " + KEY})
        dummy = await http.post("/chat", json={"prompt": "x"}, headers={"Authorization": "Bearer dummy"})
    for refused in (bare, other, wrong):
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["code"] == "invalid_api_key"
    assert right.json()["response"] == "x"
    assert dummy.status_code == 200


async def test_secure_without_keys_configured_lets_nobody_in() -> None:
    async with client(stand(keys=False)) as http:
        answer = await http.post("/chat/secure", json={"prompt": "x"}, headers={"Authorization": "Bearer any"})
    assert answer.status_code == 401


async def test_tokens_there_and_back() -> None:
    text = "<|im_start|>user 漢字"
    async with client(stand()) as http:
        tokens = (await http.post("/tokenize", json={"text": text})).json()
        back = (await http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
        outside = await http.post("/detokenize", json={"tokens": [5, 259]})
        both = await http.post("/tokenize", json={"text": "x", "messages": [{"role": "user", "content": "x"}]})
        unknown = await http.post("/tokenize", json={"text": "x", "model": "no"})
    assert tokens == {"tokens": list(text.encode()), "count": len(text.encode())}
    assert back == {"text": text}
    assert outside.status_code == 400
    assert both.status_code == 422
    assert unknown.status_code == 404


async def test_docs_know_the_routes_and_their_bodies() -> None:
    async with client(stand()) as http:
        schema = (await http.get("/openapi.json")).json()
        page = await http.get("/docs")
    assert page.status_code == 200
    assert {"/chat", "/chat/stream", "/chat/batch", "/chat/secure", "/v1/chat/completions", "/tokenize"} <= set(schema["paths"])
    assert schema["components"]["schemas"]["ChatQuestion"]["examples"][0]["prompt"]
    assert "top_k" in schema["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    text = json.dumps(schema)
    for part in text.split('"$ref": "')[1:]:
        name = part.partition('"')[0].rpartition("/")[2]
        assert name in schema["components"]["schemas"], name


async def test_docs_can_be_switched_off() -> None:
    async with client(stand(docs=False)) as http:
        assert (await http.get("/docs")).status_code == 404
        assert (await http.get("/openapi.json")).status_code == 404
