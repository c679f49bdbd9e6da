"""The sender of alerts, against a receiver that is really there, or isn't."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

import headrace.alert_webhook as sender
from headrace.alert_webhook import AlertWebhook, payload, signature
from headrace.cli.sources import load, shown
from headrace.config import AlertSection
from headrace.errors import ConfigError
from headrace.policies.alert_rules import Alert

pytestmark = pytest.mark.anyio


def alert(number: int = 0, ended_at: float | None = None) -> Alert:
    return Alert("HeadraceEngineDown", "critical", (("model", f"m{number}"),), "Down", "It died.", 1_700_000_000.25, ended_at)


class Receiver:
    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.port = 0

    @property
    def models(self) -> list[str]:
        return [json.loads(body)["commonLabels"]["model"] for _, body in self.got]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in head.splitlines()[1:-1])}
        self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.statuses.pop(0) if self.statuses else 204
        writer.write(f"HTTP/1.1 {status} x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(*statuses: int, port: int = 0) -> AsyncIterator[Receiver]:
    receiver = Receiver(*statuses)
    async with await asyncio.start_server(receiver.serve, "127.0.0.1", port) as server:
        receiver.port = server.sockets[0].getsockname()[1]
        yield receiver


async def until(found: Any) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.005)


def webhook(port: int, secret: str | None = None) -> AlertWebhook:
    return AlertWebhook(f"http://127.0.0.1:{port}/hook", secret, instance="here:1", url="http://here:1", first_pause=0.01)


async def test_in_order_and_again_until_it_is_taken() -> None:
    async with receiving(500, 302, 404) as receiver:
        hook = webhook(receiver.port, "sixteen characters")
        for number in range(3):
            hook.send(alert(number))
        await until(lambda: len(receiver.got) == 6)
        assert receiver.models == ["m0"] * 4 + ["m1", "m2"]
        for headers, body in receiver.got:
            assert headers["x-headrace-signature"] == signature(b"sixteen characters", body)
        # It had nothing to do for a while.
        await until(lambda: hook._sending is None)
        hook.send(alert(3))
        await until(lambda: receiver.models[-1] == "m3")
        await hook.close(5)
        await hook.close(5)


async def test_a_receiver_that_comes_later_or_moves() -> None:
    async with receiving() as receiver:
        port = receiver.port
    hook = webhook(port)
    with structlog.testing.capture_logs() as said:
        hook.send(alert(1))
        await until(lambda: said)
    assert said == [
        {
            "event": "alert webhook failed; it is tried again",
            "log_level": "warning",
            "alert": "HeadraceEngineDown",
            "why": "it can't be reached (ConnectError)",
        }
    ]
    async with receiving() as elsewhere:
        hook.aim(f"http://127.0.0.1:{elsewhere.port}/", None)
        await until(lambda: elsewhere.models == ["m1"])
        assert "x-headrace-signature" not in elsewhere.got[0][0]
        await hook.close(5)


async def test_what_nobody_takes_is_dropped_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MOST_PENDING", 3)
    async with receiving() as receiver:
        port = receiver.port
    hook = webhook(port)
    with structlog.testing.capture_logs() as said:
        for number in range(5):
            hook.send(alert(number))
        await hook.close()
        assert [line["event"] for line in said] == ["alert not delivered"] * 5
    # Too old.
    monkeypatch.setattr(sender, "GIVEN_UP", -1.0)
    with structlog.testing.capture_logs() as said:
        hook.send(alert(9))
        await until(lambda: hook._sending is None)
        assert [(line["event"], line["why"]) for line in said] == [("alert not delivered", "it can't be reached (ConnectError)")]


def test_the_form_is_alertmanagers() -> None:
    fired = json.loads(payload(alert(), instance="here:1", url="http://here:1"))
    cleared = json.loads(payload(alert(ended_at=1_700_000_060.5), instance="here:1", url="http://here:1"))
    common = {"groupLabels", "commonLabels", "commonAnnotations"}
    assert set(fired) == {"version", "groupKey", "truncatedAlerts", "status", "receiver", *common, "externalURL", "alerts"}
    assert (fired["status"], cleared["status"]) == ("firing", "resolved")
    one, other = fired["alerts"][0], cleared["alerts"][0]
    assert set(one) == {"status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"}
    assert one["labels"] == {"alertname": "HeadraceEngineDown", "instance": "here:1", "severity": "critical", "model": "m0"}
    assert one["startsAt"] == other["startsAt"] == "2023-11-14T22:13:20.250Z"
    assert datetime.fromisoformat(other["endsAt"]).timestamp() == 1_700_000_060.5
    assert one["endsAt"] == "0001-01-01T00:00:00Z"
    assert one["fingerprint"] == other["fingerprint"]
    assert len(one["fingerprint"]) == 16


@pytest.mark.parametrize("url", ["https://example.org/a?b=c", "http://[::1]:9000", "http://user:pass@host:1/"])
def test_addresses(url: str) -> None:
    section = AlertSection.model_validate({"alert_webhook": url})
    assert shown("alert_webhook", section.alert_webhook) == "***"
    assert url not in repr(section)


@pytest.mark.parametrize(
    "url", ["ftp://example.org/tok", "example.org/tok", "http:///tok", "file:///tok", "https://a tok", "https://a:port/tok"]
)
def test_what_is_no_web_address_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"HEADRACE_ALERT_WEBHOOK.*http or https") as refused:
        load(environ={"HEADRACE_ALERT_WEBHOOK": url}, folder=tmp_path)
    assert "tok" not in refused.value.message
