"""The transformers engine behind the whole server: every sampling field as with the own engine, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from models.tiny_llama import write_tiny_llama
from running_server import RunningServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("transformers")
    write_tiny_llama(folder / "tiny", seed=3)
    cache = {"HEADRACE_CACHE_DIR": str(folder / "cache")}
    with RunningServer(folder, str(folder / "tiny"), "--engine", "transformers", "--kv-cache-gib", "0.05", environment=cache) as running:
        yield running


def ask(server: RunningServer, **changes: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True, "temperature": 1.0, **changes}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_stream_equals_the_answer(server: RunningServer) -> None:
    whole = ask(server, seed=5)
    text = ""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "ignore_eos": True, "seed": 5, "stream": True}
    with server.client.stream("POST", "/v1/chat/completions", json={**body, "temperature": 1.0}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    text += choice["delta"].get("content") or ""
    assert text == whole["choices"][0]["message"]["content"]
    assert whole["usage"]["completion_tokens"] == 8


def test_seeds_choices_and_logprobs(server: RunningServer) -> None:
    one, same, other = ask(server, seed=1), ask(server, seed=1), ask(server, seed=2)
    assert one["choices"][0]["message"] == same["choices"][0]["message"] != other["choices"][0]["message"]
    several = ask(server, seed=1, n=3, logprobs=True, top_logprobs=4)
    assert len({choice["message"]["content"] for choice in several["choices"]}) > 1
    assert several["choices"][0]["message"] == one["choices"][0]["message"]
    assert all(len(entry["top_logprobs"]) == 4 for entry in several["choices"][2]["logprobs"]["content"])
    assert several["usage"]["completion_tokens"] == 24


def test_penalties_bias_and_filters(server: RunningServer) -> None:
    forced = ask(server, logit_bias={"65": 100}, logprobs=True)["choices"][0]
    assert {tuple(entry["bytes"]) for entry in forced["logprobs"]["content"]} == {tuple(forced["logprobs"]["content"][0]["bytes"])}
    greedy = ask(server, temperature=0)["choices"][0]["message"]["content"]
    assert ask(server, top_k=1, seed=9)["choices"][0]["message"]["content"] == greedy
    assert ask(server, temperature=0, frequency_penalty=2, repetition_penalty=5.0, presence_penalty=2)["usage"]["completion_tokens"] == 8


def test_a_bad_request_is_refused_and_harms_nobody(server: RunningServer) -> None:
    answer = server.client.post("/v1/completions", json={"prompt": [99999], "max_tokens": 2})
    assert answer.status_code == 400
    assert ask(server)["usage"]["completion_tokens"] == 8


def test_it_is_shown(server: RunningServer) -> None:
    metrics = server.client.get("/metrics").text
    assert 'headrace_gpu_memory_total_bytes{model="tiny"}' in metrics
    assert 'headrace_kv_blocks_total{model="tiny"}' in metrics
