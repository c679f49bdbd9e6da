"""What the supervisor makes of what it hears: with a key's real record, and with a configuration that changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import structlog

import headrace.alerts
from headrace.alerts import Alerts
from headrace.config import AlertSection
from headrace.control import BudgetSeen, RequestsEnded
from headrace.policies.alert_rules import RequestCounts
from headrace.records import AuditEntry, KeyRecord, LimitSpec
from headrace.stores.memory_keys import MemoryKeys

pytestmark = pytest.mark.anyio

ENTRY = AuditEntry(at=1.0, actor="test", action="key.create", subject="key_1", tenant="acme")


@asynccontextmanager
async def running(alerts: Alerts) -> AsyncIterator[None]:
    task = asyncio.create_task(alerts.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(found: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.005)


async def test_a_budget_names_its_key_and_clears_when_the_key_is_revoked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headrace.alerts, "BUDGETS_CHECKED", 0.05)
    keys = MemoryKeys()
    limits = LimitSpec(budget_tokens=100, budget_period="total")
    await keys.add(KeyRecord(id="key_1", name="the shop", prefix="hr-1", digest=b"1", tenant="acme", limits=limits), ENTRY)
    alerts = Alerts(AlertSection(alert_window=0.5), lambda: (), keys, instance="here", url="http://here")
    with structlog.testing.capture_logs() as said:
        async with running(alerts):
            alerts.hear(BudgetSeen("key:key_1", 100, 79, "total"))
            alerts.hear(BudgetSeen("key:key_1", 100, 80, "total"))
            await until(lambda: said)
            assert said[0]["event"] == "alert fires"
            assert (said[0]["key"], said[0]["key_name"], said[0]["tenant"]) == ("key_1", "the shop", "acme")
            assert said[0]["summary"] == "Most of the budget of key the shop is spent"
            await keys.revoke("key_1", time.time(), ENTRY)
            await until(lambda: len(said) > 1)
            assert said[1]["event"] == "alert cleared"
    assert len(said) == 2
    assert alerts.firing == []


async def test_other_rules_hold_at_once() -> None:
    alerts = Alerts(AlertSection(alert_window=0.5, alert_min_requests=1000), lambda: [("m", None)], MemoryKeys(), instance="", url="")
    with structlog.testing.capture_logs() as said:
        async with running(alerts):

            async def failing() -> None:
                while True:
                    alerts.hear(RequestsEnded([RequestCounts("m", requests=10, failed=1)]))
                    await asyncio.sleep(0.01)

            requests = asyncio.create_task(failing())
            alerts.judge_by(AlertSection(alert_window=0.6, alert_min_requests=10))
            await until(lambda: said)
            assert (said[0]["alert"], said[0]["model"]) == ("HeadraceErrorShareHigh", "m")
            alerts.judge_by(AlertSection(alert_window=0.6, alert_min_requests=10, alert_error_share=0.2))
            await until(lambda: len(said) > 1)
            assert said[1]["event"] == "alert cleared"
            requests.cancel()
