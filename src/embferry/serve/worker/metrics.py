"""Metrics of workers, some of whose values are read at each scrape."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client.core import CounterMetricFamily

from embferry.observe.metrics import HELD_BYTES, Metrics
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
        gauge = self.gauge(*HELD_BYTES)
        gauge.set_function(lambda: budget.held)
        if isinstance(manager, SendManager | ReceiveManager):
            self._watch_manager(manager)

    def _watch_manager(self, manager: SendManager | ReceiveManager) -> None:
        def dropped() -> dict[str, float]:
            return {"rejected": manager.rejected_messages, "dropped": manager.control.dropped_frames}

        def lost() -> dict[str, float]:
            return {name: float(transport.lost is not None) for name, transport in manager.transports.items()}

        about = "Control messages that could not be read (rejected) or sent (dropped)"
        self.reading("embferry_worker_control_messages", about, "outcome", dropped, CounterMetricFamily)
        about = "1 for a transport that has failed for good, 0 for one that works"
        self.reading("embferry_worker_transport_lost", about, "transport", lost)
        control = manager.control
        if isinstance(control, SocketControl):
            gauge = self.gauge("embferry_worker_control_connections", "Connections accepted for control messages")
            gauge.set_function(lambda: control.connections)
        if isinstance(manager, SendManager):
            gauge = self.gauge("embferry_encode_parked_requests", "Requests for embeddings that are not announced yet")
            gauge.set_function(lambda: len(manager.parked))
            gauge = self.gauge(
                "embferry_encode_parked_bytes", "Bytes of requests for embeddings that are not announced yet"
            )
            gauge.set_function(lambda: manager.parked.nbytes)


def count_connections(metrics: Metrics, transports: Sequence[Transport]) -> None:
    """Adds metrics of the data connections that transports have accepted."""
    now = "Data connections accepted and open, by transport"
    metrics.reading(
        "embferry_worker_data_connections", now, "transport", lambda: {t.name: t.connections.open for t in transports}
    )

    def closed() -> dict[str, float]:
        return {t.name: t.connections.evicted + t.connections.refused for t in transports}

    why = "Data connections closed because there were too many, by transport"
    metrics.reading("embferry_worker_data_connections_closed", why, "transport", closed, CounterMetricFamily)
