"""Every metric is in the table of docs/observability.md, and the table has no others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from serving_echo import client, stand

from headrace.http.api import create_api
from headrace.http.metrics import Metrics
from headrace.journey import Journey
from headrace.served import ServedModels

TABLE = Path(__file__).parents[2] / "docs" / "observability.md"
Line = tuple[str, frozenset[str]]


def documented() -> dict[str, Line]:
    rows = re.findall(r"^\| `(headrace_\w+)` \| (\w+) \|([^|]*)\|", TABLE.read_text(), re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows), "a metric is there twice"
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def shown(name: str, kind: str, labels: Any) -> tuple[str, Line]:
    return name + ("_total" if kind == "counter" else ""), (kind, frozenset(labels))


@pytest.mark.anyio
async def test_the_table_is_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    import prometheus_client

    from headrace.config import Config

    made: list[Metrics] = []
    create = Metrics.__init__

    def remembered(self: Metrics, *args: Any, **more: Any) -> None:
        create(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(Metrics, "__init__", remembered)
    parts = stand()
    models = ServedModels([parts.served])
    parts.app = create_api(Config(), models, Journey.standard(Config(), models), control=parts.control)
    several = {
        "memory": {"ram": {"budget": 2, "held": 1}},
        "shadows": [{"model": "a", "shadow": "b", "compared": 1, "likeness": 1.0, "failed": 0}],
    }
    listing = await parts.control.ps() | several

    async def ps() -> dict[str, Any]:
        return listing

    monkeypatch.setattr(parts.control, "ps", ps)
    async with client(parts) as http:
        text = (await http.get("/metrics")).text
    # Those that nothing was counted in yet have no samples that would show their labels.
    counted = [each for each in vars(made[-1]).values() if isinstance(each, prometheus_client.metrics.MetricWrapperBase)]
    ours = dict(shown(each._name, each._type, each._labelnames) for each in counted)
    said = dict(re.findall(r"^# TYPE (headrace_\w+) (\w+)$", text, re.MULTILINE))
    said = {name: kind for name, kind in said.items() if not name.endswith("_created")}
    assert {name: kind for name, (kind, _) in ours.items()}.items() <= said.items()
    for name, kind in said.items():
        if name not in ours:
            labels = re.search(rf"^{name}(?:{{(.*)}})? \S+$", text, re.MULTILINE)
            assert labels is not None, name
            ours[name] = kind, frozenset(re.findall(r'(\w+)="', labels[1] or ""))
    assert documented() == ours


@pytest.mark.anyio
async def test_nothing_is_by_key() -> None:
    for name, (_, labels) in documented().items():
        assert not labels & {"key", "tenant", "address", "request_id"}, name
