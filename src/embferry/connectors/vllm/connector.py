"""The classes that vLLM instantiates: the connector, in the scheduler and in each worker, and its statistics.

The counters appear in vLLM's log and on its ``/metrics``. vLLM reads the statistics of the scheduler's connector in
every step. It reads those of workers on the V2 runner only, so workers count nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.metrics import ECConnectorPromMetrics, ECConnectorStats

from ..shared.counters import BUCKETS, COUNTERS, PREFIX, SECONDS
from .config import parse
from .placement import placement
from .scheduler_side import SchedulerSide, StepMetadata
from .worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


IN_LOG = ("transfers", "resumed_transfers", "embedding_bytes", "failures", "items_offered", "encodes_saved")


class Stats(ECConnectorStats):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Changes of the counters since the last time: its ``data`` is that of ``Counters.take_changes``."""

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
        self._seconds = self._histogram_cls(PREFIX + "load_seconds", SECONDS.help, labelnames, buckets=BUCKETS)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        labels = self.per_engine_labelvalues[engine_idx]
        for name, label, amount in transfer_stats_data.get("counts", []):
            self._counters[name].labels(*labels, *([label] if label else [])).inc(amount)
        for seconds in transfer_stats_data.get("seconds", []):
            self._seconds.labels(*labels).observe(seconds)


class EmbferryConnector(ECConnectorBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Forwards each call to the half in the scheduler or in the worker.

    It is the value of ``ec_connector``; its ``ec_connector_module_path`` is ``embferry.connectors.vllm.connector``.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
        if not transfer.is_ec_consumer and parallel.pipeline_parallel_size > 1:
            # vLLM's first stage returns after the encode, and the others wait for what it never sends.
            why = "vLLM's encode instances hang with more than one; --tensor-parallel-size splits them too"
            raise ValueError(f"pipeline_parallel_size is {parallel.pipeline_parallel_size}: {why}")
        config = parse(transfer.ec_connector_extra_config)
        name = f"{transfer.engine_id}-{parallel.data_parallel_rank}"
        hosts = placement(parallel)
        hosts.check(config.host, config.ranks_port, parallel.data_parallel_size)
        if hosts.host:
            name = f"{name}-host-{hosts.host}"  # two "hosts" may be one
        self._scheduler: SchedulerSide
        self._worker: WorkerSide
        if role is ECConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, config, name, hosts)
        else:
            self._worker = WorkerSide(vllm_config, config, name, hosts)

    def shutdown(self) -> None:
        if self.role is ECConnectorRole.SCHEDULER:
            self._scheduler.close()
        else:
            self._worker.close()

    # Scheduler

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        return self._scheduler.ensure_cache_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.find(identifier) is not None

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        self._scheduler.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        step = scheduler_output
        return self._scheduler.build_connector_meta(step.free_encoder_mm_hashes, step.total_num_scheduled_tokens)

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduler.failed.take()

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.request_finished(request)

    # Worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._worker.load(self._step(), encoder_cache)

    def start_save_caches(self, **kwargs: Any) -> None:
        self._worker.start_save_caches(self._step(), kwargs["encoder_cache"])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        self._worker.publish(encoder_cache[mm_hash], mm_hash, encoded=True)

    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)  # our own scheduler side has built it
        return metadata

    # Metrics

    def get_ec_connector_stats(self) -> Stats | None:
        changes = self._scheduler.counters.take_changes() if self.role is ECConnectorRole.SCHEDULER else {}
        return Stats(changes) if changes else None

    @classmethod
    def build_ec_connector_stats(cls, data: dict[str, Any] | None = None) -> Stats | None:
        return Stats(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> PromMetrics | None:
        return PromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
