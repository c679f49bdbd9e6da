"""The alert rules and the dashboard that we ship: they fire when they should, and name only metrics that a server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from headrace.errors import ConfigError, DeadlineUnmeetable, HeadraceError, ModelError
from headrace.http.metrics import Metrics
from headrace.served import ServedModels
from promql import Evaluation, Labels, Series, grouped_by, parse_series, selectors
from running_server import RunningServer

DEPLOY = Path(__file__).parents[1] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
TESTS = DEPLOY / "prometheus" / "alerts_test.yml"
DASHBOARD = DEPLOY / "grafana" / "headrace.json"
OF_PROMETHEUS = {"job", "instance"}
"""Labels that every series gets when it is scraped."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return loaded


def targets() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def as_grafana_asks(expression: str) -> str:
    """With Grafana's variables filled in."""
    return expression.replace("$__rate_interval", "5m").replace("$job", ".*").replace("$instance", ".*").replace("$model", ".*")


# Rules


def seconds(text: str) -> float:
    parts = re.findall(r"(\d+)([smh])", text)
    return sum(timedelta(**{{"s": "seconds", "m": "minutes", "h": "hours"}[unit]: int(number)}).total_seconds() for number, unit in parts)


def firing(rule: dict[str, Any], series: list[Series], at: float, interval: float) -> list[tuple[Labels, float]]:
    """As Prometheus does it: evaluated at every interval, and true all through `for`."""
    expression, since, held = promql.parse(rule["expr"]), dict[Labels, float](), seconds(rule.get("for", "0s"))
    found: dict[Labels, float] = {}
    moment = 0.0
    while moment <= at:
        vector = Evaluation(series, moment).vector(expression)
        found = {
            frozenset(label for label in labels if label[0] != "__name__"): value for labels, value in vector.items() if value == value
        }
        since = {labels: since.get(labels, moment) for labels in found}
        moment += interval
    return [(labels, value) for labels, value in found.items() if at - since[labels] >= held]


def filled_in(template: str, labels: dict[str, str], value: float) -> str:
    """As much of Go's templates as our annotations use."""

    def word(match: re.Match[str]) -> str:
        name, _, shown = match[1].partition("|")
        if name.strip().startswith("$labels."):
            return labels[name.strip().removeprefix("$labels.")]
        ways = {
            "humanizePercentage": f"{100 * value:.4g}%",
            "humanizeDuration": f"{value:.4g}s",
            'printf "%.0f"': f"{value:.0f}",
        }
        return ways[shown.strip()]

    return re.sub(r"\{\{ (\$.*?) \}\}", word, template)


def questions() -> Iterator[Any]:
    said = yaml.safe_load(TESTS.read_text())
    for test in said["tests"]:
        for question in test["alert_rule_test"]:
            name = f"{test['name']}: {question['alertname']} at {question['eval_time']}"
            yield pytest.param(test, question, seconds(said["evaluation_interval"]), id=name)


@pytest.mark.parametrize(("test", "question", "interval"), questions())
def test_rules_fire_when_they_should(test: dict[str, Any], question: dict[str, Any], interval: float) -> None:
    series = [parse_series(one["series"], one["values"], seconds(test["interval"])) for one in test["input_series"]]
    rule = next(rule for rule in rules() if rule["alert"] == question["alertname"])
    fired = []
    for found, value in firing(rule, series, seconds(question["eval_time"]), interval):
        labels = dict(found)
        annotations = {name: filled_in(text, labels, value) for name, text in rule["annotations"].items()}
        fired.append({"exp_labels": {**labels, **rule["labels"]}, "exp_annotations": annotations})
    assert fired == question["exp_alerts"]


def test_every_rule_is_seen_to_fire_and_not_to() -> None:
    tests = [question for test in yaml.safe_load(TESTS.read_text())["tests"] for question in test["alert_rule_test"]]
    fires = {question["alertname"] for question in tests if question["exp_alerts"]}
    assert fires == {rule["alert"] for rule in rules()}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, which comes with Prometheus, is not installed")
def test_promtool_says_the_same() -> None:
    subprocess.run(["promtool", "check", "config", str(RULES.with_name("prometheus.yml"))], check=True, capture_output=True)
    done = subprocess.run(["promtool", "test", "rules", str(TESTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_have_what_people_need() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "description"}


def faults() -> set[str]:
    """Codes of errors by the server's fault."""

    def tree(root: type[HeadraceError]) -> Iterator[type[HeadraceError]]:
        yield root
        for child in root.__subclasses__():
            yield from tree(child)

    # Two are never answered with, and one is about a deadline that the client has set.
    others = (ConfigError, ModelError, DeadlineUnmeetable)
    return {error.code for error in tree(HeadraceError) if error.status >= 500 and not issubclass(error, others)}


@pytest.mark.parametrize("expression", [rule["expr"] for rule in rules() if rule["alert"] == "HeadraceErrorShareHigh"] + targets()[2:3])
def test_every_fault_of_the_server_is_in_the_error_share(expression: str) -> None:
    named = re.search(r'code=~"([a-z_|]+)"', expression)
    assert named is not None
    assert set(named[1].split("|")) == faults()


# The dashboard


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert board["id"] is None
    assert board["uid"] == "headrace"
    assert [(one["name"], one["type"], one["pluginId"]) for one in board["__inputs"]] == [("DS_PROMETHEUS", "datasource", "prometheus")]
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert list(variables) == ["datasource", "job", "instance", "model"]
    assert variables["datasource"]["type"] == "datasource"
    assert "${DS_PROMETHEUS}" in variables["datasource"]["current"]["value"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} <= {one["id"] for one in board["__requires"] if one["type"] == "panel"} | {"row"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, f"{panel['title']} lies over another panel"
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"], panel["title"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in (panel, *panel["targets"]))


def test_compose_mounts_what_there_is() -> None:
    services = yaml.safe_load((DEPLOY.parent / "compose.yaml").read_text())["services"]
    mounted = [volume.partition(":")[0] for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    files = [path for path in mounted if path.startswith("./")]
    assert len(files) == 3
    for path in files:
        assert (DEPLOY.parent / path).exists(), path
    for path in DEPLOY.rglob("*.yml"):
        assert yaml.safe_load(path.read_text()), path
    assert services["prometheus"]["profiles"] == services["grafana"]["profiles"] == ["watch"]
    scraped = yaml.safe_load(RULES.with_name("prometheus.yml").read_text())["scrape_configs"][0]
    assert (scraped["job_name"], scraped["static_configs"]) == ("headrace", [{"targets": ["headrace:8000"]}])


# Both name what a server has


class Nobody:
    """No server around it: nobody scrapes these."""

    draining = False
    started_at = 0.0

    async def ps(self) -> dict[str, Any]:
        raise AssertionError

    async def reload(self) -> list[str]:
        raise AssertionError


@pytest.fixture(scope="module")
def there_are(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Names of a running server's metrics, and the labels that each can have."""
    from prometheus_client.parser import text_string_to_metric_families as families

    with RunningServer(tmp_path_factory.mktemp("server"), "echo") as server:
        server.client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "one two three"}]}).raise_for_status()
        text = server.client.get("/metrics").raise_for_status().text
    found: dict[str, set[str]] = {"up": set()}
    for family in families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    # What nothing has counted yet isn't told, so the rest is asked of the definitions.
    for collector, names in Metrics(ServedModels([]), Nobody()).registry._collector_to_names.items():
        for name in names:
            found.setdefault(name, set()).update(getattr(collector, "_labelnames", ()))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("place", ["rules", "dashboard"])
def test_only_metrics_and_labels_that_there_are(place: str, there_are: dict[str, set[str]]) -> None:
    expressions = [rule["expr"] for rule in rules()] if place == "rules" else [as_grafana_asks(one) for one in targets()]
    assert expressions
    for expression in expressions:
        parsed = promql.parse(expression)
        labels: set[str] = set()
        for selector in selectors(parsed):
            assert selector.name in there_are, f"there is no {selector.name}"
            for matcher in selector.matchers.matchers:
                assert matcher.name in there_are[selector.name] | OF_PROMETHEUS, f"{selector.name} has no {matcher.name}"
            labels |= there_are[selector.name] | OF_PROMETHEUS
        assert grouped_by(parsed) <= labels, expression
    if place == "dashboard":
        # Whatever there is to see of the engines and of answers is on it.
        shown = {selector.name for expression in expressions for selector in selectors(promql.parse(expression))}
        for name in ("headrace_requests_total", "headrace_time_to_first_token_seconds_bucket", "headrace_kv_blocks_used"):
            assert name in shown
        for variable in dashboard()["templating"]["list"][1:]:
            metric = re.match(r"label_values\((\w+)", variable["definition"])
            assert metric is not None
            assert metric[1] in there_are
