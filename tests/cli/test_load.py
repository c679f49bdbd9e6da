from __future__ import annotations

import asyncio
import re
import socket

import pytest

from cli.protocol_server import ProtocolServer
from headrace.cli.load import Api, LoadFailed, LoadResult, Sample, make_prompts, percentile, run_load
from headrace.cli.sse import EventReader

pytestmark = pytest.mark.anyio


async def test_figures_of_a_closed_loop(protocol_server: ProtocolServer) -> None:
    done: list[Sample] = []
    protocol_server.together = 4  # with fewer users at once no answer would ever begin
    result = await run_load(protocol_server.url, users=4, requests=20, max_tokens=9, seed=3, timeout=20, on_done=done.append)
    assert result.errors == {}
    assert len(result.succeeded) == len(done) == 20
    assert [sample.number for sample in result.samples] == list(range(20))
    assert protocol_server.most_running == 4
    assert {sample.tokens for sample in result.samples} == {6}  # from the usage chunk, not the three chunks
    assert {sample.prompt_tokens for sample in result.samples} == {7}
    assert all(0 < sample.ttft <= sample.seconds and sample.tpot is not None for sample in result.samples if sample.ttft)
    figures = result.figures()
    assert (figures["model"], figures["requests"], figures["users"], figures["errors"]) == ("small", 20, 4, 0)
    assert figures["output_tokens"] == 120
    assert figures["qps"] == pytest.approx(20 / figures["total_time"])
    assert figures["ttft"]["p50"] <= figures["ttft"]["p90"] <= figures["ttft"]["p99"]


async def test_what_is_sent(protocol_server: ProtocolServer) -> None:
    await run_load(f"{protocol_server.url}/v1/", users=2, requests=5, max_tokens=9, key="sk-x", ignore_eos=True, extra={"top_k": 1})
    assert len({str(body["messages"]) for body in protocol_server.bodies}) == 5
    for body in protocol_server.bodies:
        assert {name: body[name] for name in body if name != "messages"} == {
            "model": "small",
            "max_tokens": 9,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "top_k": 1,
        }
    assert {headers["authorization"] for headers in protocol_server.headers} == {"Bearer sk-x"}


async def test_connections_are_kept(protocol_server: ProtocolServer) -> None:
    ports = set()
    original = protocol_server.__class__.__call__

    async def note(self: ProtocolServer, scope: dict, receive: object, send: object) -> None:
        if scope["path"].endswith("completions"):
            ports.add(scope["client"][1])
        await original(self, scope, receive, send)

    protocol_server.__class__.__call__ = note  # type: ignore[method-assign]
    try:
        await run_load(protocol_server.url, users=2, requests=12)
    finally:
        protocol_server.__class__.__call__ = original  # type: ignore[method-assign]
    assert len(ports) == 2


async def test_native_stream(protocol_server: ProtocolServer) -> None:
    result = await run_load(protocol_server.url, users=2, requests=4, max_tokens=5, api="native")
    assert result.errors == {}
    assert {(sample.prompt_tokens, sample.tokens) for sample in result.samples} == {(7, 6)}
    assert {sample.finish for sample in result.samples} == {"stop"}
    assert all(body["max_length"] == 5 and set(body) == {"prompt", "max_length", "temperature"} for body in protocol_server.bodies)


@pytest.mark.parametrize("api", ["openai", "native"])
async def test_chunks_are_counted_where_the_server_counts_nothing(protocol_server: ProtocolServer, api: Api) -> None:
    protocol_server.usage = protocol_server.tokenizes = False
    result = await run_load(protocol_server.url, users=1, requests=1, api=api)
    assert result.samples[0].tokens == 3


@pytest.mark.parametrize(
    ("plan", "kind"),
    [("busy", "http 503 overloaded"), ("break", "stream: engine_died"), ("drop", "connection lost")],
)
async def test_errors_by_kind(protocol_server: ProtocolServer, plan: str, kind: str) -> None:
    protocol_server.plan = plan
    result = await run_load(protocol_server.url, users=2, requests=4)
    assert result.errors == {kind: 4}
    assert result.figures()["mean_time"] is None


async def test_timeout(protocol_server: ProtocolServer) -> None:
    protocol_server.plan = "hang"
    result = await run_load(protocol_server.url, users=1, requests=1, timeout=0.3)
    assert result.errors == {"timeout": 1}
    assert await asyncio.to_thread(protocol_server.hung_up.wait, 10)


async def test_a_stream_that_just_ends_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not await reader.read(65536):  # only looking whether somebody is there
            writer.close()
            return
        body = b'data: {"choices": [{"delta": {"content": "Hi"}}]}\r\n\r\n'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await run_load(f"127.0.0.1:{port}", users=1, requests=2, model="any")
    assert result.errors == {"stream ended early": 2}
    assert result.samples[0].tokens == 1


async def test_what_is_no_http_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.read(65536):
            writer.write(b"220 mail.example ESMTP\r\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await run_load(f"http://127.0.0.1:{port}", users=1, requests=1, model="any", timeout=5)
    assert len(result.errors) == 1
    assert "not HTTP/1.1" in str(result.errors)


async def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(LoadFailed, match="No server answers"):
            await run_load(url, users=1, requests=1)
        with pytest.raises(LoadFailed, match="No server answers"):
            await run_load(url, users=1, requests=1, model="any")


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://h:port"])
async def test_what_is_no_url(url: str) -> None:
    with pytest.raises(LoadFailed):
        await run_load(url)


def test_prompts_differ_and_are_the_same_again() -> None:
    prompts = make_prompts(200, tokens=100, seed=5)
    assert prompts == make_prompts(200, tokens=100, seed=5)
    assert len(set(prompts)) == 200
    assert len({prompt[:8] for prompt in prompts}) == 200
    assert not set(prompts) & set(make_prompts(200, tokens=100, seed=6))
    assert all(90 <= len(re.findall(r"\w+", prompt)) <= 100 for prompt in prompts)


def test_percentiles_interpolate() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0], 99) == 1.0
    assert percentile([], 50) is None


def test_figures_of_nothing() -> None:
    figures = LoadResult(url="u", model=None, users=1, total_time=0.0, samples=[]).figures()
    assert (figures["qps"], figures["mean_time"], figures["ttft"]) == (0.0, None, {"p50": None, "p90": None, "p99": None})


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_the_same_however_they_are_cut(size: int) -> None:
    wire = ': hello\n\ndata: {"a": "\u2028"}\n\nevent: done\r\ndata: x\r\ndata:\r\ndata:  y\r\n\r\nid: 3\n\ndata: [DONE]\n\n'.encode()
    reader = EventReader()
    found = [event for start in range(0, len(wire), size) for event in reader.feed(wire[start : start + size])]
    assert found == [(b"", '{"a": "\u2028"}'.encode()), (b"done", b"x\n\n y"), (b"", b"[DONE]")]
