"""The dashboard and the alerts in ``deploy/`` name only metrics, labels and documents that there are."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector

import document_metrics
from metric_names import TARGET_LABELS
from tests.tooling.promql import Checker, Metric, Series, renamed, series_of
from tests.tooling.test_links import anchors_of

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy/grafana/embferry.json").read_text("utf-8"))
GROUPS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text("utf-8"))["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel, target) for panel in PANELS for target in panel["targets"]]
TEMPLATED = re.compile(r"\{\{\s*\$labels\.(\w+)\s*\}\}")
SHORT = timedelta(minutes=10)
"""A range from which on an expression is slow to change by itself."""


def metrics() -> dict[str, Metric]:
    """Returns the metrics that Prometheus has of a deployment, by name."""
    target = frozenset(TARGET_LABELS)
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    found = {"up": Metric("gauge", target)}
    for family in registry.collect():
        total = "_total" if family.type == "counter" else ""
        found[family.name + total] = Metric(family.type, target)
    for rows in document_metrics.parts().values():
        found |= {row.name: Metric(row.type, target | set(row.labels)) for row in rows}
    return found


SERIES = series_of(metrics())


def expression(query: str) -> str:
    """Returns a query of the dashboard as Grafana sends it."""
    return query.replace("$__rate_interval", "1m")


@pytest.mark.parametrize(("panel", "target"), QUERIES, ids=[f"{p['title']}-{t['refId']}" for p, t in QUERIES])
def test_a_query_of_the_dashboard_can_have_a_result(panel: dict[str, Any], target: dict[str, Any]) -> None:
    checked = Checker(expression(target["expr"]), SERIES)
    assert checked.faults == []
    for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
        assert label in checked.labels, target["legendFormat"]
    assert 'job=~"$job",instance=~"$instance"' in target["expr"]
    assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_the_dashboard_can_be_imported() -> None:
    """Grafana asks for this: distinct ids, variables that are there, panels that do not overlap."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert "__inputs" not in DASHBOARD
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "job", "instance"]
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) <= {*names, "__rate_interval"}
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    for panel in PANELS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)


def test_the_variables_choose_by_labels_of_targets() -> None:
    for variable in DASHBOARD["templating"]["list"][1:]:
        selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert isinstance(promql.parse(selector), promql.VectorSelector)
        assert label == variable["name"]
        assert label in TARGET_LABELS


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_can_fire_and_says_what_to_do(rule: dict[str, Any]) -> None:
    checked = Checker(rule["expr"], SERIES)
    assert checked.faults == []
    assert rule["alert"].startswith("Embferry")
    assert rule["labels"]["severity"] in ("critical", "warning")
    notes = rule["annotations"]
    assert notes.keys() == {"summary", "description", "documentation"}
    for label in TEMPLATED.findall(" ".join(notes.values())):
        assert label in checked.labels, label
    path, _, anchor = notes["documentation"].partition("#")
    assert path in ("docs/troubleshooting.md", "docs/operations.md")
    assert anchor in anchors_of((ROOT / path).read_text("utf-8"))
    assert "for" in rule or longest_range(rule["expr"]) >= SHORT, "a single scrape would raise the alarm"


def longest_range(text: str) -> timedelta:
    """Returns the longest range of a selector."""
    found = [timedelta()]

    def visit(expr: promql.Expr) -> None:
        if isinstance(expr, promql.MatrixSelector):
            found.append(expr.range)

    promql.walk(promql.parse(text), pre_visit=visit)
    return max(found)


def test_alerts_have_distinct_names() -> None:
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 10


def test_a_metric_that_is_renamed_is_missed() -> None:
    expressions = [expression(target["expr"]) for _, target in QUERIES] + [rule["expr"] for rule in RULES]
    used = set().union(*(Checker(text, SERIES).names for text in expressions))
    assert len(used) > 50
    missed = {
        name
        for name, series in renamed({n: SERIES[n] for n in used})
        if any(Checker(t, series).faults for t in expressions)
    }
    assert missed == used


LABELS = frozenset({"job", "code"})
FEW = {
    "items_total": Series(True, LABELS),
    "held_bytes": Series(False, LABELS),
    "wait_seconds_bucket": Series(True, LABELS | {"le"}, is_bucket=True),
    "wait_seconds_count": Series(True, LABELS),
}


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("sum by (code) (rate(items_total[5m])) / 2", {"code"}),
        ("held_bytes", LABELS),
        ("max_over_time(held_bytes[5m]) == 0", LABELS),
        ("histogram_quantile(0.9, sum by (le, job) (rate(wait_seconds_bucket[5m])))", {"job"}),
        ("sum by (job) (held_bytes) / (sum by (code) (held_bytes) > 0)", set()),
        ("sum without (code) (increase(wait_seconds_count[1h]))", {"job"}),
    ],
)
def test_an_expression_that_can_have_a_result(text: str, labels: set[str]) -> None:
    checked = Checker(text, FEW)
    assert (checked.faults, checked.labels) == ([], labels)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rate(items[5m])", "there is no metric items"),
        ("rate(wait_seconds[5m])", "there is no metric wait_seconds"),
        ('rate(items_total{kind="a"}[5m])', "items_total has no label kind"),
        ("sum by (kind) (rate(items_total[5m]))", "there is no label kind"),
        ("items_total", "a counter is read with rate or increase"),
        ("max_over_time(items_total[5m])", "a counter is read with rate or increase"),
        ("rate(held_bytes[5m])", "a gauge is never read with rate or increase"),
        ("sum(rate(wait_seconds_bucket[5m]))", "buckets are read with histogram_quantile"),
        ("histogram_quantile(0.9, rate(wait_seconds_count[5m]))", "histogram_quantile reads buckets"),
        ("histogram_quantile(0.9, sum by (job) (rate(wait_seconds_bucket[5m])))", "histogram_quantile needs le"),
    ],
)
def test_an_expression_that_cannot_is_refused(text: str, fault: str) -> None:
    assert any(fault in found for found in Checker(text, FEW).faults)
