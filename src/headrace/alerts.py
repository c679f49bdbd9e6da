"""The server's alerts, in the supervisor: what is heard of requests, engines and budgets, and what the log and the webhook are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

from headrace.alert_webhook import AlertWebhook
from headrace.config import AlertSection
from headrace.control import BudgetSeen, RequestsEnded
from headrace.errors import StoreUnavailable
from headrace.policies.alert_rules import Alert, AlertBoard, AlertRules, BudgetUse
from headrace.ports import KeyRegister
from headrace.records import KeyRecord

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
        self, section: AlertSection, engines: Callable[[], Iterable[tuple[str, str | None]]], keys: KeyRegister, *, instance: str, url: str
    ) -> None:
        self._board = AlertBoard(AlertRules.of(section), time.monotonic, time.time)
        self._engines = engines
        self._keys = keys
        self._instance = instance
        self._url = url
        self._webhook: AlertWebhook | None = None
        self._interval = LOOK
        self._beside: set[asyncio.Task[None]] = set()
        self._log: Any = structlog.get_logger("headrace.alerts")
        self.judge_by(section)

    @property
    def firing(self) -> list[Alert]:
        return self._board.firing

    def judge_by(self, section: AlertSection) -> None:
        """Go on with other thresholds and another receiver. What fires already is judged by the new rules."""
        rules = AlertRules.of(section)
        self._board.judge_by(rules)
        self._interval = max(0.02, min(LOOK, rules.engine_down_seconds / 4, rules.window / 40))
        if section.alert_webhook is None:
            if self._webhook is not None:
                self._do_beside(self._webhook.close())
            self._webhook = None
            return
        address = section.alert_webhook.get_secret_value()
        secret = None if section.alert_webhook_secret is None else section.alert_webhook_secret.get_secret_value()
        if self._webhook is None:
            self._webhook = AlertWebhook(address, secret, instance=self._instance, url=self._url)
        else:
            self._webhook.aim(address, secret)

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
        self._do_beside(self._hear_of_key(use))

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
            for task in self._beside:
                task.cancel()
            if self._webhook is not None:
                await self._webhook.close(FAREWELL)

    def _do_beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="alerts")
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

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
