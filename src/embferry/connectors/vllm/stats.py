"""The connector's counters as vLLM's own statistics: in vLLM's log, and on its ``/metrics``.

vLLM reads the statistics of the scheduler's connector in every step. It reads those of workers on the V2 runner only,
so workers count nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from .counters import BUCKETS, COUNTERS, PREFIX, SECONDS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

IN_LOG = ("transfers", "resumed_transfers", "embedding_bytes", "failures", "items_offered", "encodes_saved")


class Stats(ECConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Changes of the counters since the last time: its ``data`` has the lists of ``Changes``."""

    data: dict[str, list[Any]]

    def aggregate(self, other: ECConnectorStats) -> ECConnectorStats:
        for name, values in other.data.items():
            self.data.setdefault(name, []).extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        reduced: dict[str, int | float] = dict.fromkeys(IN_LOG, 0)
        for name, _, amount in self.data.get("counts", []):
            if name in reduced:
                reduced[name] += amount
        if seconds := self.data.get("seconds"):
            reduced["mean_seconds"] = round(sum(seconds) / len(seconds), 6)
        return reduced

    def is_empty(self) -> bool:
        return not any(self.data.values())


class PromMetrics(ECConnectorPromMetrics):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The metrics of ``counters.py`` on vLLM's ``/metrics``: the same names, with vLLM's labels before ours."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(PREFIX + name, definition.help, [*labelnames, *definition.labels])
            for name, definition in COUNTERS.items()
        }
        self._seconds = self._histogram_cls(PREFIX + "seconds", SECONDS.help, labelnames, buckets=BUCKETS)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, label, amount in transfer_stats_data.get("counts", []):
            self._counters[name].labels(*labels, *([label] if label else [])).inc(amount)
        for seconds in transfer_stats_data.get("seconds", []):
            self._seconds.labels(*labels).observe(seconds)
