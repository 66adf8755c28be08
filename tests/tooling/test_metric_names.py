"""The names of all metrics follow the rules in docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import document_metrics
from embferry.discovery.bootstrap_server import METRICS, BootstrapServer
from metric_names import LABELS, PARTS, TARGET_LABELS, Row, faults

ROOT = Path(__file__).parents[2]
USERS = [
    *(ROOT / "docs").glob("*.md"),
    ROOT / "src/embferry/serve/page/page.js",
    ROOT / "src/embferry/bench/serving/counters.py",
]
GOOD = Row("embferry_router_chat_seconds", "histogram", (), "From request to end of answer")


def test_every_metric_follows_the_rules() -> None:
    assert faults(document_metrics.parts()) == []


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (Row("chat_seconds", "histogram", (), "Time"), "is not embferry_PART_WORDS"),
        (Row("embferry_chat_seconds", "histogram", (), "Time"), "is not embferry_PART_WORDS"),
        (Row("embferry_router_chatSeconds", "histogram", (), "Time"), "is not embferry_PART_WORDS"),
        (Row("embferry_router_encodes", "counter", (), "Items"), "counters end with _total"),
        (Row("embferry_router_workers_total", "gauge", (), "Workers"), "counters end with _total"),
        (Row("embferry_router_chat", "histogram", (), "From start to end"), "ends with its unit"),
        (Row("embferry_router_bytes_sent_total", "counter", (), "What was sent"), "the unit stands at the end"),
        (Row("embferry_router_chat_milliseconds", "gauge", (), "How long"), "milliseconds is no base unit"),
        (Row("embferry_router_sent_kib_total", "counter", (), "What was sent"), "kib is no base unit"),
        (Row("embferry_router_ttft_seconds", "histogram", (), "Time"), "ttft is an abbreviation"),
        (Row("embferry_router_ec_hits_total", "counter", (), "Hits"), "ec is an abbreviation"),
        (Row("embferry_router_held", "gauge", (), "Bytes held"), "it ends with _bytes"),
        (Row("embferry_router_wait", "gauge", (), "Time of the wait"), "it ends with _seconds"),
        (Row("embferry_router_worker_count", "gauge", (), "Workers"), "is a suffix that Prometheus gives"),
        (Row("embferry_router_rooms_by_state", "gauge", ("state",), "Rooms"), "a label's name is no part of a name"),
        (Row("embferry_router_lines_dropped", "gauge", (), "Lines"), "counted by a counter"),
        (Row("embferry_router_lines_total", "counter", ("colour",), "Lines"), "the label colour is not in LABELS"),
        (Row("embferry_router_lines_total", "counter", ("worker",), "Lines"), "the label worker is the target's"),
    ],
)
def test_a_name_that_breaks_a_rule_is_found(row: Row, fault: str) -> None:
    assert any(fault in found for found in faults({"Router": [GOOD, row]}))


@pytest.mark.parametrize(
    "other", [GOOD._replace(type="gauge"), GOOD._replace(labels=("code",)), GOOD._replace(help="Something else")]
)
def test_one_name_means_one_thing(other: Row) -> None:
    assert faults({"Router": [GOOD], "Worker": [GOOD]}) == []
    (found,) = faults({"Router": [GOOD], "Worker": [other]})
    assert "another process serves it" in found


def test_no_label_of_a_metric_is_one_of_a_target() -> None:
    """Prometheus would rename it to ``exported_…``."""
    assert not LABELS.keys() & set(TARGET_LABELS)


def test_every_part_and_label_is_used() -> None:
    rows = [row for rows in document_metrics.parts().values() for row in rows]
    assert {row.name.split("_")[1] for row in rows} == PARTS.keys()
    assert {label for row in rows for label in row.labels} == LABELS.keys()


@pytest.mark.integration
def test_the_bootstrap_server_serves_what_it_defines() -> None:
    with BootstrapServer("127.0.0.1", 0) as server:
        text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families.keys() == {name.removesuffix("_total") for name in METRICS}
    for name, (kind, labels, about) in METRICS.items():
        family = families[name.removesuffix("_total")]
        assert (family.type, family.documentation) == (kind, about)
        assert all(tuple(sample.labels) == labels for sample in family.samples)


def test_the_names_in_documents_page_and_reports_exist() -> None:
    """A name in a text ends with ``_*`` if it stands for several."""
    known = {row.name for rows in document_metrics.parts().values() for row in rows}
    known |= {
        f"{name}_{suffix}" for name in known if name.endswith("_seconds") for suffix in ("bucket", "sum", "count")
    }
    pattern = re.compile(rf"\bembferry_(?:{'|'.join(PARTS)})_[a-z_]+\*?")
    used = {(path.name, name) for path in USERS for name in pattern.findall(path.read_text("utf-8"))}
    assert {"operations.md", "troubleshooting.md", "page.js", "counters.py"} <= {page for page, _ in used}
    wrong = {
        (page, name)
        for page, name in used
        if not (name in known or (name.endswith("_*") and any(one.startswith(name[:-1]) for one in known)))
    }
    assert wrong == set()
