"""vLLM's V1 and V2 runners as the connector sees them: vLLM's own code calls our hooks, without a model.

The two context managers around the encoder are vLLM's. This module does what the runners do before and inside them.
"""

from __future__ import annotations

import importlib
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from embferry.connectors.vllm.host_claims import new_secret

from .pair import until

WIDTH, TOKENS = 64, 50
MODEL = Path(__file__).parents[2] / "examples" / "media"
"""Stands for the folder of a model."""
SETTINGS = {"transports": ["shm"], "num_blocks": 4, "block_size": 8, "peer_timeout": 2.0}

SECRET = new_secret()
"""Comes from vLLM's group of workers where they are processes."""

Cache = dict[str, torch.Tensor]


@cache
def vllm() -> Any:
    """Imports vLLM's modules and our connector, which need vLLM's environment. Ignores vLLM's own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SimpleNamespace(
            v1=importlib.import_module("vllm.v1.worker.ec_connector_model_runner_mixin"),
            v2=importlib.import_module("vllm.v1.worker.gpu.ec_connector"),
            role=importlib.import_module("vllm.distributed.ec_transfer.ec_connector.base").ECConnectorRole,
            status=importlib.import_module("vllm.v1.request").RequestStatus,
            connector=importlib.import_module("embferry.connectors.vllm.connector").EmbferryConnector,
            worker=importlib.import_module("embferry.connectors.vllm.worker_side"),
            stats=importlib.import_module("embferry.connectors.vllm.connector").Stats,
        )


def config(role: str, rank: int, ranks: int, engine: str, hosts: int = 1, **extra: Any) -> Any:
    world_size = 2 * ranks if hosts == 1 else ranks  # two pipeline stages, or tensor parallelism over hosts
    return SimpleNamespace(
        ec_transfer_config=SimpleNamespace(
            ec_connector_extra_config=SETTINGS | extra,
            engine_id=engine,
            is_ec_producer=role in ("ec_producer", "ec_both"),
            is_ec_consumer=role in ("ec_consumer", "ec_both"),
        ),
        parallel_config=SimpleNamespace(
            rank=rank,
            world_size=world_size,
            local_world_size=world_size // hosts,
            node_rank_within_dp=rank * hosts // world_size,
            master_addr="127.0.0.1",
            data_parallel_size=1,
            pipeline_parallel_size=1 if role == "ec_producer" or hosts > 1 else 2,
            tensor_parallel_size=ranks,
            prefill_context_parallel_size=1,
            data_parallel_rank=0,
        ),
        model_config=SimpleNamespace(
            dtype=torch.float32,
            get_inputs_embeds_size=lambda: WIDTH,
            is_encoder_decoder=False,
            model=str(MODEL),
            model_weights="",
            quantization=None,
            hf_config=SimpleNamespace(to_dict=dict),
            multimodal_config=None,
        ),
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config={}),
        lora_config=None,
        weight_transfer_config=None,
        additional_config={},
    )


def feature(name: str, offset: int = 0, *, pixels: bool = False) -> Any:
    data = SimpleNamespace(keys=lambda: ["pixel_values"], get_data=dict) if pixels else None
    position = SimpleNamespace(offset=offset, length=TOKENS, get_num_embeds=lambda: TOKENS)
    return SimpleNamespace(identifier=name, modality="image", data=data, mm_position=position)


class Request(SimpleNamespace):
    def __init__(self, name: str, *features: Any, params: Mapping[str, Any] | None = None) -> None:
        super().__init__(
            request_id=name,
            mm_features=list(features),
            ec_transfer_params=params,
            status=vllm().status.RUNNING,
            lora_request=None,
        )

    def get_num_encoder_embeds(self, index: int) -> int:
        return TOKENS


class Side:
    """One engine: the scheduler's connector, and one connector for each rank."""

    def __init__(self, runner: str, role: str, ranks: int = 1, hosts: int = 1, **extra: Any) -> None:
        self.runner, self.ranks, engine = runner, ranks, uuid.uuid4().hex
        self.scheduler = vllm().connector(config(role, 0, ranks, engine, hosts, **extra), vllm().role.SCHEDULER)
        every = range(config(role, 0, ranks, engine, hosts, **extra).parallel_config.world_size)
        self.configs = [config(role, rank, ranks, engine, hosts, **extra) for rank in every]
        with patch.object(vllm().worker, "get_world_group", lambda: SimpleNamespace(broadcast_object=lambda _: SECRET)):
            self.workers = [vllm().connector(each, vllm().role.WORKER) for each in self.configs]
        self.caches: list[Cache] = [{} for _ in self.workers]

    def plan(self, freed: Sequence[str] = (), tokens: int = 1) -> Any:
        """Returns what the scheduler sends for a step."""
        output = SimpleNamespace(
            free_encoder_mm_hashes=list(freed), finished_req_ids=set(), total_num_scheduled_tokens=tokens
        )
        output.ec_connector_metadata = self.scheduler.build_connector_meta(output)
        return output

    def run(self, output: Any, encode: Mapping[str, torch.Tensor] | None = None, ranks: Sequence[int] = ()) -> None:
        """Runs a step with tokens, on the given ranks of the first stage or on all of them."""
        for rank in ranks or range(self.ranks):
            self._free(output, rank)
            with self._encoding(output, rank):
                for name, tensor in (encode or {}).items():
                    self.caches[rank][name] = tensor
                    if self.runner == "v1":
                        vllm().v1.ECConnectorModelRunnerMixin.maybe_save_ec_to_connector(self.caches[rank], name)

    def run_empty(self, output: Any, rank: int = 0) -> None:
        """Runs a step without tokens. On the V1 runner of a consumer it has no effect."""
        self._free(output, rank)
        if self.runner == "v2":
            with _current(self.workers[rank]):
                vllm().v2.ActiveECConnector(self.configs[rank], self.caches[rank]).no_forward(output)

    def close(self) -> None:
        for connector in (self.scheduler, *self.workers):
            connector.shutdown()

    def _free(self, output: Any, rank: int) -> None:
        for name in output.free_encoder_mm_hashes:
            self.caches[rank].pop(name, None)

    @contextmanager
    def _encoding(self, output: Any, rank: int) -> Iterator[None]:
        with _current(self.workers[rank]):
            if self.runner == "v1":
                around = vllm().v1.ECConnectorModelRunnerMixin.maybe_get_ec_connector_output(output, self.caches[rank])
            else:
                around = vllm().v2.ActiveECConnector(self.configs[rank], self.caches[rank]).maybe_get_output(output)
            with around:
                yield


@contextmanager
def _current(worker: Any) -> Iterator[None]:
    """Makes this worker's connector the one of the process."""
    modules = (vllm().v1, vllm().v2)
    before = [(module, module.get_ec_transfer, module.has_ec_transfer) for module in modules]
    for module in modules:
        module.get_ec_transfer, module.has_ec_transfer = lambda: worker, lambda: True
    try:
        yield
    finally:
        for module, get, has in before:
            module.get_ec_transfer, module.has_ec_transfer = get, has


def output(seed: int) -> Any:
    """Returns an embedding like the encoder's."""
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def encode(side: Side, *names: str, request: str = "encode", room: int | None = None) -> dict[str, Any]:
    """Runs a request for these items, and returns its response's parameters."""
    params = None if room is None else {"embferry": {"room": room}}
    asked = Request(request, *(feature(name, at * TOKENS) for at, name in enumerate(names)), params=params)
    scheduler = side.scheduler
    until(lambda: scheduler.ensure_cache_available(asked, 0))  # the ranks map what the scheduler has
    new = {}
    for index, name in enumerate(dict.fromkeys(names)):
        if name in side.caches[0]:
            continue
        if not scheduler.has_cache_item(name):
            new[name] = output(sum(name.encode()))
        scheduler.update_state_after_alloc(asked, index)
    side.run(side.plan(), new)
    asked.status = vllm().status.FINISHED_LENGTH_CAPPED
    _, answer = scheduler.request_finished(asked)
    assert answer is not None
    return answer


def fetched(side: Side, request: Request) -> None:
    until(lambda: side.scheduler.ensure_cache_available(request, 0))


def counted(side: Side, name: str, label: str = "") -> int:
    half = side.scheduler._scheduler
    found: int = half.counters.read().get((name, label), 0)
    return found


def loaded(side: Side, request: Request) -> None:
    """Reserves room for the request's item, as vLLM does."""
    assert side.scheduler.has_cache_item(request.mm_features[0].identifier)
    side.scheduler.update_state_after_alloc(request, 0)
