"""Metrics of workers, some of whose values are read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from embferry.observe.metrics import Metrics
from embferry.transports.contract import Transport


class WorkerMetrics(Metrics):
    """Base of the metrics of both workers."""

    buckets = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


@dataclass(eq=False)
class Reading(Collector):
    """A gauge or counter with one label, whose values are read at each scrape, on any thread.

    Attributes:
        read: returns the metric's value for each value of the label.
    """

    name: str
    help: str
    label: str
    read: Callable[[], Mapping[str, float]]
    kind: type[CounterMetricFamily | GaugeMetricFamily] = GaugeMetricFamily

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        family = self.kind(self.name, self.help, labels=[self.label])
        for value, number in self.read().items():
            family.add_metric([value], number)
        yield family


def count_connections(metrics: Metrics, transports: Sequence[Transport]) -> None:
    """Adds metrics of the data connections that transports have accepted."""
    register = metrics.registry.register
    now = "Data connections accepted and open, by transport"
    register(
        Reading("embferry_data_connections", now, "transport", lambda: {t.name: t.connections.open for t in transports})
    )

    def closed() -> dict[str, float]:
        return {t.name: t.connections.evicted + t.connections.refused for t in transports}

    why = "Data connections closed because there were too many, by transport"
    register(Reading("embferry_data_connections_closed", why, "transport", closed, CounterMetricFamily))
