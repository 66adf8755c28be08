"""The class that vLLM instantiates in the scheduler and in each worker. It forwards each call to the half meant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase, ECConnectorMetadata, ECConnectorRole

from .config import parse
from .scheduler_side import SchedulerSide, StepMetadata
from .stats import PromMetrics, Stats
from .worker_side import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


class EmbferryConnector(ECConnectorBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """The value of ``ec_connector``; its ``ec_connector_module_path`` is ``embferry.connectors.vllm.connector``."""

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        transfer, parallel = vllm_config.ec_transfer_config, vllm_config.parallel_config
        config = parse(transfer.ec_connector_extra_config)
        name = f"{transfer.engine_id}-{parallel.data_parallel_rank}"
        # Only the first pipeline stage has an encoder cache.
        ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
        self._scheduler: SchedulerSide
        self._worker: WorkerSide
        if role is ECConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, config, name, ranks)
        else:
            self._worker = WorkerSide(vllm_config, name, ranks)

    def shutdown(self) -> None:
        if self.role is ECConnectorRole.SCHEDULER:
            self._scheduler.close()

    # Scheduler

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        return self._scheduler.ensure_cache_available(request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        return self._scheduler.has_cache_item(identifier)

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        self._scheduler.update_state_after_alloc(request, index)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> ECConnectorMetadata:
        step = scheduler_output
        return self._scheduler.build_connector_meta(step.free_encoder_mm_hashes, step.total_num_scheduled_tokens)

    def take_unavailable_requests(self) -> set[str]:
        return self._scheduler.take_unavailable_requests()

    def request_finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.request_finished(request)

    # Worker

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self._worker.start_load_caches(self._step(), encoder_cache)

    def start_save_caches(self, **kwargs: Any) -> None:
        self._worker.start_save_caches(self._step(), kwargs["encoder_cache"])

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        self._worker.save_caches(encoder_cache, mm_hash)

    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)  # our own scheduler side has built it
        return metadata

    # Metrics

    def get_ec_connector_stats(self) -> Stats | None:
        return self._scheduler.stats() if self.role is ECConnectorRole.SCHEDULER else None

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
