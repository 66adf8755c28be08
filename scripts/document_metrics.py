"""Writes docs/metrics.md from the metrics' definitions. With ``--check``, only exits with status 1 if it is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

from prometheus_client.core import CounterMetricFamily

from embferry.cache.folder import FolderStore
from embferry.connectors.shared import counters
from embferry.discovery.bootstrap_server import METRICS
from embferry.observe.metrics import Metrics, RouterMetrics
from embferry.serve.encode.metrics import EncodeMetrics
from embferry.serve.encode.shared_cache import SharedCacheMetrics
from embferry.serve.http.unproved import Unproved
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.worker.metrics import Reading, WorkerMetrics, count_connections
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_manager import SendManager
from generated_page import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
HEAD = """# Metrics

Generated from the code by `python scripts/document_metrics.py`; edits here are lost.

Names end with their unit: `_seconds`, `_bytes`; a name without one is a count. Counters end with `_total`. A histogram
is read as `_bucket`, `_sum` and `_count`.
"""


class Row(NamedTuple):
    """One metric as it is served."""

    name: str
    type: str
    labels: tuple[str, ...]
    help: str


def parts() -> dict[str, list[Row]]:
    """Returns the metrics of each part, under the part's title."""
    router, vllm = RouterMetrics(), VllmRouterMetrics()
    encode, language = EncodeMetrics(Mock(), dict), LanguageMetrics(dict, dict)
    for metrics in (router, vllm, encode, language):
        Unproved(Mock(), Mock(), "", Mock(), metrics)
    _watch(encode, Mock(spec=SendManager, control=Mock(spec=SocketControl)))
    _watch(language, Mock(spec=ReceiveManager, control=Mock(spec=SocketControl)))
    SharedCacheMetrics(encode, Mock(spec=FolderStore))
    return {
        "Router before workers of this project, at `/metrics`": _rows(router),
        "Router before vLLM, at `/metrics`": _rows(vllm),
        "Encode worker, at `/metrics`": _rows(encode),
        "Language worker, at `/metrics`": _rows(language),
        "Bootstrap server, at `/metrics`": [Row(name, *about) for name, about in METRICS.items()],
        "Connectors, at `metrics_port` (vLLM) and `EMBFERRY_SGLANG_METRICS_PORT` (SGLang)": _connector(),
    }


def _watch(metrics: WorkerMetrics, manager: object) -> None:
    metrics.watch(manager, Mock())
    count_connections(metrics, ())


def _rows(metrics: Metrics) -> list[Row]:
    return [_row(collector) for collector in metrics.registry._collector_to_names]


def _row(collector: Any) -> Row:
    if isinstance(collector, Reading):
        kind = "counter" if collector.kind is CounterMetricFamily else "gauge"
        return Row(_served(collector.name, kind), kind, (collector.label,), collector.help)
    kind = collector._type
    return Row(_served(collector._name, kind), kind, tuple(collector._labelnames), collector._documentation)


def _served(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else name


def _connector() -> list[Row]:
    prefix = counters.PREFIX
    rows = [Row(f"{prefix}{name}_total", "counter", d.labels, d.help) for name, d in counters.COUNTERS.items()]
    rows += [Row(prefix + name, "gauge", d.labels, d.help) for name, d in counters.GAUGES.items()]
    return [*rows, Row(f"{prefix}seconds", "histogram", (), counters.SECONDS.help)]


def page() -> str:
    """Returns the page."""
    text = [HEAD]
    for title, rows in parts().items():
        text += [f"## {title}\n", "| metric | type | labels | meaning |\n|---|---|---|---|"]
        for row in sorted(rows):
            labels = ", ".join(f"`{label}`" for label in row.labels)
            text.append(f"| `{row.name}` | {row.type} | {labels} | {row.help} |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
