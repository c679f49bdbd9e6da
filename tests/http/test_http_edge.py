"""What every answer has, the request log, health, metrics, and the routes for operators."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_echo import KEY, ScriptedEngine, Stand, client, stand
from structlog.testing import capture_logs

from headrace.types import Delta, EngineStatus, GenerateRequest, Report

pytestmark = pytest.mark.anyio


async def test_every_answer_has_an_id_of_ours() -> None:
    seen = set()
    async with client(stand(max_body_mib=1)) as http:
        for method, path, body in (
            ("GET", "/health", b""),
            ("GET", "/nowhere", b""),
            ("GET", "/v1/nowhere", b""),
            ("PUT", "/chat", b""),
            ("POST", "/chat", b"{"),
            ("POST", "/chat", b"x" * 2_000_000),
            ("POST", "/chat/secure", b""),
            ("POST", "/chat/stream", b'{"prompt": "x"}'),
            ("POST", "/v1/completions", b'{"prompt": "x"}'),
            ("GET", "/docs", b""),
            ("GET", "/metrics", b""),
        ):
            answer = await http.request(method, path, content=body, headers={"X-Request-Id": "mine"})
            assert answer.headers["x-request-id"].startswith("req_")
            seen.add(answer.headers["x-request-id"])
    assert len(seen) == 11


async def test_a_clients_id_is_echoed_only_if_short_and_printable() -> None:
    async with client(stand()) as http:
        for sent, back in ((b"job-7 a", "job-7 a"), (b"x" * 128, "x" * 128), (b"x" * 129, None), (b"\xc3\xa9", None), (b"a\tb", None)):
            answer = await http.get("/health", headers={b"X-Client-Request-Id": sent})  # type: ignore[dict-item]
            assert answer.headers.get("x-client-request-id") == back


async def test_unknown_paths_and_methods_speak_the_dialect() -> None:
    async with client(stand()) as http:
        native = await http.get("/nowhere")
        openai = await http.post("/v1/nowhere")
        method = await http.get("/chat")
        openai_method = await http.delete("/v1/models/x")
        slash = await http.get("/health/")
        heads = [(await http.head(path)).status_code for path in ("/health", "/health/live", "/v1/models", "/v1/models/x", "/chat")]
    assert (native.status_code, native.json()["code"]) == (404, "not_found")
    assert (openai.status_code, openai.json()["error"]["code"]) == (404, "not_found")
    assert (method.status_code, method.json()["code"], method.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert (openai_method.status_code, openai_method.json()["error"]["code"]) == (405, "method_not_allowed")
    assert slash.status_code == 404
    assert heads == [200, 200, 200, 404, 405]


async def test_one_log_line_a_request_without_prompts_and_keys() -> None:
    made = stand()
    with capture_logs() as lines:
        async with client(made) as http:
            answer = await http.post(
                "/chat/secure", json={"prompt": "hush-hush"}, headers={"Authorization": f"Bearer {KEY}", "X-Client-Request-Id": "job-7"}
            )
            await http.get("/docs")
            await http.get("/some/secret/path?with=query")
    line, docs, nowhere = lines
    assert line["event"] == "request"
    assert line["method"] == "POST"
    assert line["route"] == "/chat/secure"
    assert line["status"] == 200
    assert 0 < line["seconds"] < 30
    assert line["model"] == "house"
    assert line["completion_tokens"] == len("hush-hush")
    assert line["prompt_tokens"] > line["completion_tokens"]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert line["client_request_id"] == "job-7"
    assert len(line["key"]) == 8
    assert docs["route"] == "/docs"
    assert nowhere["route"] == "(none)"
    told = str(lines)
    assert "hush" not in told
    assert KEY not in told
    assert "secret" not in told


async def test_the_tenant_is_the_key_or_the_address() -> None:
    async def once(request: GenerateRequest) -> Any:
        yield [Delta(0, 0, (65,), "A", "stop"), Report(1, 0, 1, 0, 0, 0)]

    engine = ScriptedEngine(once)
    made = stand(engine, trusted_proxies=("10.0.0.0/8",))
    tenants = []
    for address, headers in (
        ("10.0.0.1", {"X-Forwarded-For": "198.51.100.1"}),
        ("198.51.100.1", {}),
        ("198.51.100.1", {"X-Forwarded-For": "6.6.6.6", "Authorization": "Bearer dummy"}),
        ("198.51.100.2", {}),
        ("198.51.100.1", {"Authorization": f"Bearer {KEY}"}),
        ("198.51.100.9", {"Authorization": f"Bearer {KEY}"}),
    ):
        async with client(made, address) as http:
            assert (await http.post("/chat", json={"prompt": "x"}, headers=headers)).status_code == 200
        tenants.append(engine.requests[-1].tenant)
    assert tenants[0] == tenants[1] == tenants[2]
    assert tenants[4] == tenants[5]
    assert len(set(tenants)) == 3


async def test_health_says_what_is_and_why() -> None:
    made = stand()
    async with client(made) as http:

        async def states() -> list[int]:
            return [(await http.get(path)).status_code for path in ("/health", "/health/live", "/health/ready", "/health/startup")]

        well = (await http.get("/health")).json()
        assert well["status"] == "healthy"
        assert well["service"] == "headrace"
        assert well["version"]
        assert well["model"] == "house"
        assert well["uptime_seconds"] >= 0
        assert await states() == [200, 200, 200, 200]

        made.served.status = EngineStatus(state="starting", restarts=1, reason="The engine's process ended.")
        ill = (await http.get("/health")).json()
        assert ill["status"] == "unhealthy"
        assert "The engine's process ended." in ill["reason"]
        assert await states() == [503, 200, 503, 200]

        made.served.card = None
        made.served.status = EngineStatus(state="starting", reason="Loading.")
        new = (await http.get("/health")).json()
        assert new["status"] == "starting"
        assert "Loading." in new["reason"]
        assert await states() == [503, 200, 503, 503]

        made.served.status = EngineStatus(state="failed", reason="No memory.")
        assert (await http.get("/health")).json()["status"] == "unhealthy"


async def test_draining_refuses_new_calls() -> None:
    made = stand()
    made.control.draining = made.control.leaving = True
    async with client(made) as http:
        # What is queued for acceptance, or comes on an open connection, is still served, and asked not to come again.
        last = await http.post("/v1/completions", json={"prompt": "x"})
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        made.control.refusing = True
        assert (await http.get("/health/ready")).status_code == 503
        assert (await http.get("/health")).json()["status"] == "unhealthy"
        answer = await http.post("/v1/completions", json={"prompt": "x"})
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert (await http.get("/v1/models")).status_code == 200


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_requests_and_tokens_and_ask_the_engine() -> None:
    async def two(request: GenerateRequest) -> Any:
        yield [Delta(0, 0, (65,), "A")]
        yield [Delta(0, 1, (65,), "A", "stop")]
        yield [Report(5, 3, 2, 1.0, 2.0, 3.0)]

    class Fresh(ScriptedEngine):
        asked = 0

        async def refresh(self) -> None:
            self.asked += 1

    engine = Fresh(two)
    async with client(stand(engine)) as http:
        await http.post("/chat", json={"prompt": "x"})
        await http.post("/chat", json={"prompt": ""})
        await http.post("/v1/completions", json={"prompt": "x", "model": "made-up"})
        await http.request("BREW", "/teapot")
        answer = await http.get("/metrics")
    assert engine.asked == 1
    assert answer.headers["content-type"].startswith("text/plain")
    found = samples(answer.text)
    house = (("model", "house"),)
    assert found["headrace_sequences_running", house] == 2
    assert found["headrace_sequences_waiting", house] == 3
    assert found["headrace_engine_steps_total", house] == 5
    assert found["headrace_ready", house] == 1
    assert found["headrace_engine_restarts_total", house] == 0
    assert found["headrace_prompt_tokens_total", house] == 5
    assert found["headrace_cached_tokens_total", house] == 3
    assert found["headrace_completion_tokens_total", house] == 2
    assert found["headrace_time_to_first_token_seconds_count", house] == 1
    assert found["headrace_time_per_output_token_seconds_count", house] == 1
    assert found["headrace_queue_seconds_sum", house] == pytest.approx(0.001)
    assert found["headrace_requests_in_flight", ()] == 1
    requests = {labels: value for (name, labels), value in found.items() if name == "headrace_requests_total"}
    told = {(dict(labels)["route"], dict(labels)["status"], dict(labels)["model"]) for labels in requests}
    assert told == {("/chat", "200", "house"), ("/chat", "422", ""), ("/v1/completions", "404", ""), ("(none)", "404", "")}
    assert "made-up" not in answer.text
    assert "BREW" not in answer.text


_ONE_PROCESS = """
import asyncio, sys
sys.path[:0] = [{tests!r}]
from serving_echo import client, stand
async def main():
    async with client(stand()) as http:
        await http.post("/chat", json={{"prompt": "abc"}})
        print((await http.get("/metrics")).text)
asyncio.run(main())
"""


@pytest.mark.slow
async def test_several_processes_add_up(tmp_path: Path) -> None:
    script = _ONE_PROCESS.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for turn in (1, 2):
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        text = "\n".join(line for line in done.stdout.splitlines() if line.startswith(("#", "headrace_")))
        found = samples(text)
        assert found["headrace_completion_tokens_total", (("model", "house"),)] == 3 * turn
        assert found["headrace_sequences_running", (("model", "house"),)] == 0


async def ps_status(made: Stand, address: str, **headers: str) -> int:
    async with client(made, address) as http:
        return (await http.get("/admin/ps", headers=headers)).status_code


async def test_the_process_list_needs_a_key_from_other_machines() -> None:
    made = stand(trusted_proxies=("127.0.0.0/8", "203.0.113.0/24"))
    assert await ps_status(made, "127.0.0.1") == 200
    assert await ps_status(made, "::1") == 200
    assert await ps_status(made, "203.0.113.1") == 401
    assert await ps_status(made, "127.0.0.1", **{"X-Forwarded-For": "127.0.0.1"}) == 401
    assert await ps_status(made, "203.0.113.1", **{"X-Forwarded-For": "127.0.0.1"}) == 401
    assert await ps_status(made, "127.0.0.1", Forwarded="for=127.0.0.1") == 401


async def test_cors_is_by_configuration() -> None:
    origin = {"Origin": "https://app.example"}
    async with client(stand()) as http:
        assert "access-control-allow-origin" not in (await http.get("/health", headers=origin)).headers
    async with client(stand(cors_origins=("https://app.example",))) as http:
        plain = await http.post("/v1/completions", json={"prompt": "x"}, headers=origin)
        refused = await http.post("/v1/completions", json={}, headers=origin)
        stream = await http.post("/chat/stream", json={"prompt": "x"}, headers=origin)
        for answer in (plain, refused, stream):
            assert answer.headers["access-control-allow-origin"] == "https://app.example"
            assert "X-Request-Id" in answer.headers["access-control-expose-headers"]
            assert "X-Headrace-Cache" in answer.headers["access-control-expose-headers"]
        ask = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        preflight = await http.options("/v1/chat/completions", headers=ask)
        assert preflight.status_code == 200
        assert preflight.headers["x-request-id"]
        change = await http.options("/admin/tenants/acme", headers=ask | {"Access-Control-Request-Method": "PATCH"})
        assert change.status_code == 200
        other = await http.get("/health", headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_gzip_for_long_answers_never_for_streams() -> None:
    long = {"prompt": "x" * 3000}
    async with client(stand()) as http:
        packed = await http.post("/chat", json=long)
        short = await http.post("/chat", json={"prompt": "x"})
        stream = await http.post("/chat/stream", json=long)
        plain = await http.post("/chat", json=long, headers={"Accept-Encoding": "identity"})
        unwanted = await http.post("/chat", json=long, headers={"Accept-Encoding": "gzip;q=0"})
        huge = await http.post("/tokenize", json={"text": "x" * 100_000})
    assert packed.headers["content-encoding"] == huge.headers["content-encoding"] == "gzip"
    assert "accept-encoding" in packed.headers["vary"].lower()
    assert packed.json()["response"] == "x" * 512
    assert huge.json()["count"] == 100_000
    for answer in (short, stream, plain, unwanted):
        assert "content-encoding" not in answer.headers


async def test_tables_of_fields_match_the_structs() -> None:
    from headrace.http import openai_nothing, openai_wire

    for table, struct in (
        (openai_nothing.CHAT, openai_wire.ChatCompletionRequest),
        (openai_nothing.COMPLETION, openai_wire.CompletionRequest),
        (openai_nothing.MESSAGE, openai_wire.ChatMessage),
    ):
        unset = {each.name for each in msgspec.structs.fields(struct) if each.default is msgspec.UNSET}
        assert unset == set(table.known)
