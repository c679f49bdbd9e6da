"""Requests that come at moments of their own."""

from __future__ import annotations

import asyncio

import pytest

from cli.protocol_server import ProtocolServer
from headrace.cli.load import Sample, run_load

pytestmark = pytest.mark.anyio


async def test_they_come_whether_or_not_others_are_done(protocol_server: ProtocolServer) -> None:
    protocol_server.together = 6  # no answer begins before so many are there
    done: list[Sample] = []
    at = [0.0, 0.0, 0.05, 0.1, 0.1, 0.3]
    result = await run_load(protocol_server.url, arrivals=at, timeout=20, on_done=done.append)
    assert result.errors == {}
    assert len(done) == 6
    assert [sample.number for sample in result.samples] == list(range(6))
    first = result.samples[0].started
    assert all(sample.started - first >= moment for sample, moment in zip(result.samples[2:], at[2:], strict=True))
    assert {sample.tokens for sample in result.samples} == {6}
    assert {sample.prompt_tokens for sample in result.samples} == {7}


async def test_the_native_route_and_none_at_all(protocol_server: ProtocolServer) -> None:
    result = await run_load(protocol_server.url, arrivals=[0.0, 0.01], api="native")
    assert {(sample.prompt_tokens, sample.tokens, sample.error) for sample in result.samples} == {(7, 6, None)}
    assert (await run_load(protocol_server.url, arrivals=[])).samples == []


@pytest.mark.parametrize(
    ("plan", "kind"),
    [("busy", "http 503 overloaded"), ("break", "stream: engine_died"), ("drop", "connection lost")],
)
async def test_errors_by_kind(protocol_server: ProtocolServer, plan: str, kind: str) -> None:
    protocol_server.plan = plan
    result = await run_load(protocol_server.url, arrivals=[0.0, 0.0, 0.05, 0.1])
    assert result.errors == {kind: 4}


async def test_timeout(protocol_server: ProtocolServer) -> None:
    protocol_server.plan = "hang"
    result = await run_load(protocol_server.url, arrivals=[0.0, 0.1], timeout=0.3)
    assert result.errors == {"timeout": 2}
    assert all(0.3 <= sample.seconds < 5 for sample in result.samples)
    assert await asyncio.to_thread(protocol_server.hung_up.wait, 10)


async def test_connections_are_kept_and_one_that_was_closed_meanwhile_is_made_again() -> None:
    connections = 0
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        asked = 0
        while await reader.read(65536):
            connections += not asked
            asked += 1
            if asked == 3:  # it was closed while the request was on its way
                break
            writer.write(answer)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
        ended.release()

    ended = asyncio.Semaphore(0)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await run_load(f"127.0.0.1:{port}", arrivals=[0.1 * number for number in range(5)], model="any")
        for _ in range(1 + connections):  # one only looked whether somebody is there
            await asyncio.wait_for(ended.acquire(), 10)
    assert result.errors == {"http 503": 5}
    assert connections == 3


async def test_nobody_there_any_more() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server.close()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    # The first connection only looks whether somebody is there.
    result = await run_load(f"127.0.0.1:{port}", arrivals=[0.2, 0.3], model="any", timeout=20)
    assert [sample.error and sample.error.startswith("connect: ") for sample in result.samples] == [True, True]
    assert all(sample.seconds < 10 for sample in result.samples)
