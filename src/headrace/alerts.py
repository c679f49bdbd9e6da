"""The server's alerts, in the supervisor: what is heard of requests, engines and budgets, and what the log and the webhook are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog

from headrace.alert_webhook import AlertWebhook
from headrace.config import AlertSection
from headrace.control import BudgetSeen, RequestsEnded
from headrace.errors import StoreUnavailable
from headrace.policies.alert_rules import Alert, AlertBoard, AlertRules, BudgetUse
from headrace.stores.sql_keys import SqlKeys
from headrace.types import KeyRecord

LOOK = 1.0
"""Seconds between looks at what is true; shorter where a rule wants something to last for less."""
BUDGETS_CHECKED = 60.0
"""Seconds between questions to the store whether keys whose budget is nearly spent still have that budget."""
STORE_TIMEOUT = 5.0
FAREWELL = 1.0
"""Seconds that alerts on their way to the webhook get when the server stops."""


class Alerts:
    """`engines` says of each model why its engine can't be used, None if it can. `instance` and `url` are the server's, for the webhook."""

    def __init__(
        self, section: AlertSection, engines: Callable[[], Iterable[tuple[str, str | None]]], keys: SqlKeys, *, instance: str, url: str
    ) -> None:
        rules = AlertRules.of(section)
        self._board = AlertBoard(rules, time.monotonic, time.time)
        self._engines = engines
        self._keys = keys
        self._webhook: AlertWebhook | None = None
        if section.alert_webhook is not None:
            secret = section.alert_webhook_secret
            address = section.alert_webhook.get_secret_value()
            self._webhook = AlertWebhook(address, None if secret is None else secret.get_secret_value(), instance=instance, url=url)
        self._interval = max(0.02, min(LOOK, rules.engine_down_seconds / 4, rules.window / 40))
        self._asking: set[asyncio.Task[None]] = set()
        self._log: Any = structlog.get_logger("headrace.alerts")

    @property
    def firing(self) -> list[Alert]:
        return self._board.firing

    def hear(self, message: RequestsEnded | BudgetSeen) -> None:
        """From an API process."""
        if isinstance(message, RequestsEnded):
            for counts in message.counts:
                self._board.count(counts)
            return
        use = BudgetUse(message.subject, message.budget, message.spent, message.period)
        if not self._board.rules.nearly_spent(use.spent, use.budget) or not use.subject.startswith("key:"):
            self._board.budget(use)
            return
        task = asyncio.create_task(self._hear_of_key(use), name="alert names its key")
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    async def run(self) -> None:
        """Until cancelled."""
        checked = time.monotonic()
        try:
            while True:
                await asyncio.sleep(self._interval)
                for model, down in self._engines():
                    self._board.engine(model, down)
                if time.monotonic() - checked >= BUDGETS_CHECKED:
                    await self._check_budgets()
                    checked = time.monotonic()
                for alert in self._board.changes():
                    self._tell(alert)
        finally:
            for task in self._asking:
                task.cancel()
            if self._webhook is not None:
                await self._webhook.close(FAREWELL)

    def _tell(self, alert: Alert) -> None:
        said = {"alert": alert.name, "severity": alert.severity, "summary": alert.summary, "why": alert.description, **dict(alert.labels)}
        if alert.ended_at is None:
            self._log.warning("alert fires", **said)
        else:
            self._log.info("alert cleared", **said, seconds=round(alert.ended_at - alert.started_at, 1))
        if self._webhook is not None:
            self._webhook.send(alert)

    async def _hear_of_key(self, use: BudgetUse) -> None:
        try:
            found = await self._key(use)
        except (StoreUnavailable, TimeoutError):
            found = None
        if found is not None:
            use = BudgetUse(use.subject, use.budget, use.spent, use.period, name=found.name, tenant=found.tenant)
        self._board.budget(use)

    async def _check_budgets(self) -> None:
        """A key that was revoked, or has another budget by now, may never be heard of again."""
        for use in self._board.budgets:
            if not use.subject.startswith("key:"):
                continue
            try:
                found = await self._key(use)
            except (StoreUnavailable, TimeoutError):
                return
            expired = found is not None and found.expires_at is not None and found.expires_at <= time.time()
            if found is None or found.revoked_at is not None or expired or found.limits.budget_tokens is None:
                self._board.forget_budget(use.subject)

    async def _key(self, use: BudgetUse) -> KeyRecord | None:
        async with asyncio.timeout(STORE_TIMEOUT):
            return await self._keys.key(use.subject.removeprefix("key:"))
