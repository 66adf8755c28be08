"""Writes docs/metrics.md from the metrics' definitions. With ``--check``, only exits with status 1 if it is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily

from embferry.cache.folder import FolderStore
from embferry.connectors.shared import counters
from embferry.discovery.bootstrap_server import METRICS
from embferry.observe.metrics import Metrics, Reading, RouterMetrics
from embferry.serve.encode.metrics import EncodeMetrics
from embferry.serve.encode.shared_cache import SharedCacheMetrics
from embferry.serve.http.unproved import Unproved
from embferry.serve.language.metrics import LanguageMetrics
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.worker.metrics import WorkerMetrics, count_connections
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_manager import SendManager
from generated_page import write_or_check
from metric_names import LABELS, PARTS, TARGET_LABELS, Row

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"


def _lines(table: dict[str, str]) -> str:
    return "".join(f"| `{name}` | {about} |\n" for name, about in table.items())


HEAD = f"""# Metrics

Generated from the code by `python scripts/document_metrics.py`; edits here are lost.

## Names

`embferry_`, the part, what is measured, the unit: the rules are those of
[Prometheus' guide](https://prometheus.io/docs/practices/naming/), and `scripts/metric_names.py` states
them for the test that keeps them.

- The unit is `_seconds` or `_bytes`, the base units. A name without one is a count. No word is abbreviated.
- A counter ends with `_total` and only rises. A gauge never does. A histogram is read as `_bucket`, `_sum` and
  `_count`.
- One name has one type, one meaning and the same labels in every process. A label has the same
  meaning in every metric, and none is named like one of a target ({", ".join(f"`{name}`" for name in TARGET_LABELS)}).
- A sum over the labels of a metric means something. So different things have
  different names, also where one includes the other.

| part | is served by |
|---|---|
{_lines(PARTS)}
| label | value |
|---|---|
{_lines(LABELS)}
Routers and workers also serve the metrics `process_…` of Prometheus' own libraries, such as
`process_resident_memory_bytes`, `process_cpu_seconds_total` and `process_open_fds`.
"""


def parts() -> dict[str, list[Row]]:
    """Returns the metrics of each part, under the part's title."""
    router, vllm = RouterMetrics(), VllmRouterMetrics()
    encode, language = EncodeMetrics(Mock(), dict), LanguageMetrics(dict, dict)
    for metrics in (router, vllm, encode, language):
        Unproved(Mock(), Mock(), "", Mock(), metrics)
    _watch(encode, Mock(spec=SendManager, control=Mock(spec=SocketControl)))
    _watch(language, Mock(spec=ReceiveManager, control=Mock(spec=SocketControl)))
    SharedCacheMetrics(encode, Mock(spec=FolderStore))
    language.watch_kept(None)
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
    collectors = metrics.registry._collector_to_names
    return [_row(collector) for collector in collectors if not isinstance(collector, ProcessCollector)]


def _row(collector: Any) -> Row:
    if isinstance(collector, Reading):
        kind = "counter" if collector.kind is CounterMetricFamily else "gauge"
        return Row(_served(collector.name, kind), kind, (collector.label,) if collector.label else (), collector.help)
    kind = collector._type
    return Row(_served(collector._name, kind), kind, tuple(collector._labelnames), collector._documentation)


def _served(name: str, kind: str) -> str:
    return f"{name}_total" if kind == "counter" else name


def _connector() -> list[Row]:
    prefix = counters.PREFIX
    rows = [Row(f"{prefix}{name}_total", "counter", d.labels, d.help) for name, d in counters.COUNTERS.items()]
    rows += [Row(prefix + name, "gauge", d.labels, d.help) for name, d in counters.GAUGES.items()]
    return [*rows, Row(f"{prefix}load_seconds", "histogram", (), counters.SECONDS.help)]


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
