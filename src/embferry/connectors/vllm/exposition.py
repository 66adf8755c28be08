"""The numbers as Prometheus reads them, from an address of this process: vLLM's own runners do not collect them all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from embferry.protocol.errors import LocalProtocolError, TransportError

from .tally import BUCKETS, COUNTERS, GAUGES, PREFIX, SECONDS, Tally

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Collector:
    """Asked by prometheus_client each time that somebody looks."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        reading = self._tally.read()
        for name, metric in COUNTERS.items():
            family = CounterMetricFamily(PREFIX + name, metric.help, labels=[metric.label] if metric.label else [])
            values = {label: value for (counted, label), value in reading.counts.items() if counted == name}
            for label, value in (values or ({} if metric.label else {"": 0})).items():
                family.add_metric([label] if metric.label else [], value)
            yield family
        for name, value in self._tally.gauges().items():
            yield GaugeMetricFamily(PREFIX + name, GAUGES[name].help, value=value)
        bounds = [*map(str, BUCKETS), "+Inf"]
        buckets = list(zip(bounds, accumulate(reading.seconds), strict=True))
        yield HistogramMetricFamily(PREFIX + "seconds", SECONDS.help, buckets=buckets, sum_value=reading.seconds_sum)


class Exposition:
    """``http://host:port/metrics``, until it is closed.

    :param port: 0 for any; :attr:`port` says which.
    :raises LocalProtocolError: prometheus_client is not installed.
    :raises TransportError: the port cannot be had.
    """

    def __init__(self, tally: Tally, host: str, port: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            why = f"metrics_port needs prometheus_client, which is not installed here: {error}"
            raise LocalProtocolError(f"{why}; install it, or leave metrics_port out") from error
        registry = CollectorRegistry()
        registry.register(Collector(tally))
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise TransportError(f"metrics_port: cannot listen on {host}:{port}: {error}; choose another") from error
        self.port: int = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
