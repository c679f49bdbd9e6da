"""Sends alerts to the operator's webhook, in the form of Prometheus' Alertmanager (version 4), so that its receivers understand them.

https://prometheus.io/docs/alerting/latest/configuration/#webhook_config
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import random
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from headrace import __version__
from headrace.policies.alert_rules import Alert

if TYPE_CHECKING:
    import httpx

TIMEOUT = 10.0
"""Seconds for one call of the webhook, all in all."""
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds between attempts: doubling, with a fifth more or less by chance."""
GIVEN_UP = 86_400.0
"""Seconds after which an alert that nobody took is dropped."""
MOST_PENDING = 1000
"""Alerts that wait for the receiver; the oldest are dropped first."""
NEVER = "0001-01-01T00:00:00Z"
"""How Alertmanager says that an alert has not ended."""


class AlertWebhook:
    """One receiver. `send` never waits; what can't be delivered is tried again, in order, until it is a day old.

    `instance` and `url` say which server it is. Redirects are not followed: what answers with one has not taken the alert.
    """

    def __init__(self, address: str, secret: str | None, *, instance: str, url: str, first_pause: float = FIRST_PAUSE) -> None:
        self.aim(address, secret)
        self._instance = instance
        self._url = url
        self._first_pause = first_pause
        self._pending: deque[tuple[float, Alert]] = deque()
        self._sending: asyncio.Task[None] | None = None
        self._log: Any = structlog.get_logger("headrace.alerts")

    def aim(self, address: str, secret: str | None) -> None:
        """Where to send from here on, and how to sign it; what is pending goes there too."""
        self._address = address
        self._secret = None if secret is None else secret.encode()

    def send(self, alert: Alert) -> None:
        """Have it delivered, after those before it."""
        if len(self._pending) >= MOST_PENDING:
            _, dropped = self._pending.popleft()
            self._log.error("alert not delivered", alert=dropped.name, why=f"{MOST_PENDING} others wait for the webhook")
        self._pending.append((time.monotonic(), alert))
        if self._sending is None:
            self._sending = asyncio.create_task(self._deliver(), name="alert webhook")

    async def close(self, timeout: float = 0.0) -> None:
        """Give what is pending `timeout` seconds, and drop the rest. Idempotent."""
        task = self._sending
        if task is None:
            return
        await asyncio.wait((task,), timeout=timeout)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _, alert in self._pending:
            self._log.error("alert not delivered", alert=alert.name, why="the server is stopping")
        self._pending.clear()

    async def _deliver(self) -> None:
        try:
            while self._pending:
                # Reading the machine's certificates takes a while, and others wait for this process.
                client = await asyncio.to_thread(_client)
                async with client:
                    await self._deliver_by(client)
        finally:
            self._sending = None

    async def _deliver_by(self, client: httpx.AsyncClient) -> None:
        pause = self._first_pause
        while self._pending:
            entry = self._pending[0]
            queued_at, alert = entry
            why = await self._post(client, alert)
            if why is not None and time.monotonic() - queued_at <= GIVEN_UP:
                if pause == self._first_pause:
                    self._log.warning("alert webhook failed; it is tried again", alert=alert.name, why=why)
                await asyncio.sleep(pause * random.uniform(0.8, 1.2))
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if why is not None:
                self._log.error("alert not delivered", alert=alert.name, why=why)
            elif pause != self._first_pause:
                self._log.info("alert webhook answers again")
                pause = self._first_pause
            if self._pending and self._pending[0] is entry:  # else it was dropped meanwhile
                self._pending.popleft()

    async def _post(self, client: httpx.AsyncClient, alert: Alert) -> str | None:
        """One attempt; why it failed. What is said holds nothing of the address, which may be a secret."""
        import httpx

        body = payload(alert, instance=self._instance, url=self._url)
        headers = {"Content-Type": "application/json", "User-Agent": f"headrace/{__version__}"}
        if self._secret is not None:
            headers["X-Headrace-Signature"] = signature(self._secret, body)
        try:
            async with asyncio.timeout(TIMEOUT), client.stream("POST", self._address, content=body, headers=headers) as answer:
                # Of what it answers only the status counts: nothing of the body is read.
                return None if answer.is_success else f"it answered with status {answer.status_code}"
        except (httpx.HTTPError, httpx.InvalidURL, OSError, TimeoutError) as error:
            return f"it can't be reached ({type(error).__name__})"


def _client() -> httpx.AsyncClient:
    import httpx

    return httpx.AsyncClient(timeout=TIMEOUT, follow_redirects=False)


def signature(secret: bytes, body: bytes) -> str:
    """The header's value: HMAC-SHA256 of the body's bytes, in hexadecimal digits."""
    return "sha256=" + hmac.new(secret, body, hashlib.sha256).hexdigest()


def payload(alert: Alert, *, instance: str, url: str) -> bytes:
    """The JSON that the webhook gets: always one alert."""
    status = "firing" if alert.ended_at is None else "resolved"
    labels = {"alertname": alert.name, "instance": instance, "severity": alert.severity, **dict(alert.labels)}
    annotations = {"summary": alert.summary, "description": alert.description}
    fingerprint = hashlib.sha256(json.dumps(labels, sort_keys=True).encode()).hexdigest()[:16]
    said = {
        "version": "4",
        "groupKey": "{}:{" + ", ".join(f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in sorted(labels.items())) + "}",
        "truncatedAlerts": 0,
        "status": status,
        "receiver": "headrace",
        "groupLabels": labels,
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": url,
        "alerts": [
            {
                "status": status,
                "labels": labels,
                "annotations": annotations,
                "startsAt": _time(alert.started_at),
                "endsAt": NEVER if alert.ended_at is None else _time(alert.ended_at),
                "generatorURL": url,
                "fingerprint": fingerprint,
            }
        ],
    }
    return json.dumps(said, ensure_ascii=False).encode()


def _time(moment: float) -> str:
    """RFC 3339, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
