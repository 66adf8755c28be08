"""Metrics of workers, some of whose values are read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from embferry.observe.metrics import Metrics


class WorkerMetrics(Metrics):
    """Base of the metrics of both workers."""

    buckets = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

    def read(self, name: str, help: str, label: str, read: Callable[[], Mapping[str, float]], **kind: bool) -> None:
        """Adds a metric whose values are read at each scrape; see :class:`Readings`."""
        self.registry.register(Readings(name, help, label, read, **kind))


class Readings(Collector):
    """A metric with one label.

    Args:
        name: the metric's name.
        help: its description.
        label: the label's name.
        read: returns the metric's value for each value of the label. Called at each scrape, on any thread.
        counter: whether the metric is a counter; otherwise it is a gauge.
    """

    def __init__(
        self, name: str, help: str, label: str, read: Callable[[], Mapping[str, float]], *, counter: bool = False
    ) -> None:
        self._name, self._help, self._label, self._read = name, help, label, read
        self._family = CounterMetricFamily if counter else GaugeMetricFamily

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        family = self._family(self._name, self._help, labels=[self._label])
        for value, number in self._read().items():
            family.add_metric([value], number)
        yield family
