"""Metrics of workers, some of whose values are read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from embferry.observe.metrics import Metrics
from embferry.serve.byte_budget import ByteBudget
from embferry.transfer.control.sockets import SocketControl
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport


class WorkerMetrics(Metrics):
    """Base of the metrics of both workers."""

    buckets = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

    def watch(self, manager: object, budget: ByteBudget) -> None:
        """Adds the values of the worker's budget, and of its manager if it speaks our own protocol.

        They are read at each scrape.
        """
        gauge = self.gauge("embferry_held_bytes", "Bytes of media, prompts and embeddings held for requests")
        gauge.set_function(lambda: budget.held)
        if isinstance(manager, SendManager | ReceiveManager):
            self._watch_manager(manager)

    def _watch_manager(self, manager: SendManager | ReceiveManager) -> None:
        def dropped() -> dict[str, float]:
            return {"rejected": manager.rejected_messages, "dropped": manager.control.dropped_frames}

        def lost() -> dict[str, float]:
            return {name: float(transport.lost is not None) for name, transport in manager.transports.items()}

        about = "Control messages that could not be read (rejected) or sent (dropped)"
        self.registry.register(Reading("embferry_control_messages", about, "outcome", dropped, CounterMetricFamily))
        about = "1 for a transport that has failed for good, 0 for one that works"
        self.registry.register(Reading("embferry_transport_lost", about, "transport", lost))
        control = manager.control
        if isinstance(control, SocketControl):
            gauge = self.gauge("embferry_control_connections", "Connections accepted for control messages")
            gauge.set_function(lambda: control.connections)
        if isinstance(manager, SendManager):
            gauge = self.gauge("embferry_parked_requests", "Requests for embeddings that are not announced yet")
            gauge.set_function(lambda: len(manager.parked))
            gauge = self.gauge("embferry_parked_bytes", "Bytes of such requests")
            gauge.set_function(lambda: manager.parked.nbytes)


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
