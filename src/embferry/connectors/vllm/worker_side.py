"""The connector's half in a worker: copies embeddings out of vLLM's encoder cache, and into it."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.platforms import current_platform

from embferry.transfer.failures import attempt

from ..shared.shape import Shape, digest_of
from ..shared.shared_rows import SharedRows
from .channel import Publish, publish
from .config import ConnectorConfig
from .device_copies import DeviceCopies
from .host_claims import new_secret
from .host_receiver import HostReceiver, OtherHost, endpoint_of_scheduler
from .placement import Placement
from .rank_memory import RankMemory
from .scheduler_side import StepMetadata

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

PUBLISH_TIMEOUT_S = 10.0


class WorkerSide:
    """One in each worker process. Of a producer's ranks only the first publishes, because all have the same outputs."""

    def __init__(self, vllm_config: VllmConfig, config: ConnectorConfig, name: str, placement: Placement) -> None:
        """``name`` is that of the engine on this host. If there are several hosts, all workers must be made at once."""
        parallel, model = vllm_config.parallel_config, vllm_config.model_config
        rank = parallel.rank % parallel.world_size
        self._name, self._host, self._ranks = name, placement.host, placement.ranks_here
        self._rank = rank - placement.host * placement.per_host  # on this host
        self._publishes = vllm_config.ec_transfer_config.is_ec_producer and rank == 0
        # Rank 0 draws the secret, and vLLM's own group of workers tells it to the others.
        secret = "" if placement.hosts == 1 else str(get_world_group().broadcast_object(new_secret()))
        self._receiver: HostReceiver | None = None
        if placement.host and rank < placement.ranks and self._rank == 0:
            dtype, hidden = str(model.dtype).removeprefix("torch."), model.get_inputs_embeds_size()
            endpoint = endpoint_of_scheduler(config, placement.address)
            host = OtherHost(placement.host, self._ranks, endpoint, secret)
            self._receiver = HostReceiver(config, name, host, hidden, dtype)
        self._memory = RankMemory(name, self._rank, secret) if rank < placement.ranks else None
        device = current_platform.device_type
        self._copies = DeviceCopies(device, getattr(torch, device))  # on this worker's current device
        self._contents: dict[str, str] = {}  # keys in the shared cache of what this step encodes, by hash
        self._completed: set[int] = set()  # numbers of the completed loads that the scheduler still repeats

    def start_save_caches(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Prepares a producer's step.

        Loads the embeddings that the scheduler has kept, so that they are not encoded again. Publishes the embeddings
        of earlier steps that the scheduler has evicted and vLLM's cache still has.
        """
        self._contents = metadata.contents
        self.load(metadata, encoder_cache)
        for mm_hash in metadata.publish:
            if mm_hash in encoder_cache:
                self.publish(encoder_cache[mm_hash], mm_hash, encoded=False)

    def load(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Does each load once, although the scheduler repeats it until it sees the number."""
        if self._memory is None:
            return
        loads = metadata.loads
        self._completed &= {load.number for load in loads}
        for load in loads:
            if load.number in self._completed:
                continue
            shared = self._memory.find(load.rooms[self._host - 1] if self._host else load.key)
            if load.wanted and load.mm_hash not in encoder_cache:
                shape = load.shape
                tensor = torch.from_numpy(shared.rows).view(getattr(torch, shape.dtype))
                # On a CPU vLLM reads the mapping itself, which lasts as long as the tensor. Nothing writes there now.
                encoder_cache[load.mm_hash] = self._copies.to_device(tensor.reshape(shape.tokens, shape.width))
            shared.completed[self._rank] = load.number
            self._completed.add(load.number)
        if self._receiver is not None:
            self._receiver.drop(metadata.dropped)

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        if self._memory is not None:
            self._memory.close()

    def publish(self, output: torch.Tensor, mm_hash: str, *, encoded: bool) -> None:
        """Gives an embedding to the scheduler. ``encoded``: the model has just encoded it.

        After a failure the engine continues, and the scheduler refuses to offer the item when its request finishes.
        """
        if not self._publishes:
            return
        if (error := attempt(self._publish, output, mm_hash, encoded)) is not None:
            log.error("the embedding %s cannot be published: %s", mm_hash, error, exc_info=error)

    def _publish(self, output: torch.Tensor, mm_hash: str, encoded: bool) -> None:
        tensor = output.detach()
        tensor = self._copies.to_host(tensor.reshape(len(tensor), -1).contiguous())
        tokens, width = tensor.shape
        shape = Shape(tokens, width, str(tensor.dtype).removeprefix("torch."))
        with closing(SharedRows.make(shape, self._ranks)) as shared:
            np.copyto(shared.rows, tensor.view(torch.uint8).numpy())
            content = self._contents.get(mm_hash, "") if encoded else ""
            published = Publish(mm_hash, shape, digest_of(shared.rows, shape), encoded, content)
            publish(self._name, published, shared.fd, PUBLISH_TIMEOUT_S)
