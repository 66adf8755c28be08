"""The connector's half in a worker: takes embeddings out of vLLM's encoder cache, and puts them in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from embferry.protocol.errors import TransportError

from .coordinates import digest_of
from .loads import Load
from .scheduler_side import StepMetadata
from .shared import SharedRows, attach
from .shelf import Item, ToShelf

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger(__name__)

TO_SHELF_TIMEOUT = 10.0


class WorkerSide:
    """Made once a worker process. Of several ranks of a producer the first one publishes: all have the same.

    :param ranks: those that have an encoder cache: of the first pipeline stage.
    """

    def __init__(self, vllm_config: VllmConfig, name: str, ranks: int) -> None:
        parallel = vllm_config.parallel_config
        self._rank, self._ranks = parallel.rank % parallel.world_size, ranks
        self._publishes = vllm_config.ec_transfer_config.is_ec_producer and self._rank == 0
        self._shelf = ToShelf(name, TO_SHELF_TIMEOUT)
        self._loaded: set[int] = set()  # of the loads that are still being asked for

    def start_load_caches(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        if self._rank < self._ranks:
            self._load(metadata.loads, encoder_cache)

    def start_save_caches(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        """Of a producer: what the scheduler kept and need not be encoded again, and what was encoded in an earlier step
        and the scheduler has given up since."""
        if self._rank < self._ranks:
            self._load(metadata.loads, encoder_cache)
        for mm_hash in metadata.publish:
            if mm_hash in encoder_cache:
                self._publish(encoder_cache[mm_hash], mm_hash, encoded=False)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        """What has just been encoded."""
        self._publish(encoder_cache[mm_hash], mm_hash, encoded=True)

    def _load(self, loads: tuple[Load, ...], encoder_cache: dict[str, torch.Tensor]) -> None:
        """Each once, however often it is asked: with its mark, the scheduler is free to give the memory up."""
        self._loaded &= {load.number for load in loads}
        for load in loads:
            if load.number in self._loaded:
                continue
            memory = attach(load.place)
            if load.wanted and load.mm_hash not in encoder_cache:
                rows = torch.from_numpy(memory.rows.copy())
                tensor = rows.view(getattr(torch, load.dtype)).reshape(load.place.tokens, load.width)
                encoder_cache[load.mm_hash] = tensor.to(_device())
            memory.marks[self._rank] = load.number
            self._loaded.add(load.number)

    def _publish(self, output: torch.Tensor, mm_hash: str, *, encoded: bool) -> None:
        """A scheduler that does not take it in refuses the item when its request finishes; the engine goes on."""
        if not self._publishes:
            return
        tensor = output.detach()
        tensor = tensor.reshape(len(tensor), -1).contiguous().cpu()
        tokens, width = tensor.shape
        dtype = str(tensor.dtype).removeprefix("torch.")
        shared = SharedRows.make(tokens, width * tensor.element_size(), self._ranks)
        try:
            np.copyto(shared.rows, tensor.view(torch.uint8).numpy())
            digest = digest_of(shared.rows, dtype, width)
            self._shelf.put(Item(mm_hash, shared.place, dtype, width, digest, encoded))
        except TransportError as error:
            log.error("the embedding %s stays in the worker: %s", mm_hash, error)
        finally:
            shared.close()


def _device() -> torch.device:
    """Of this worker: the accelerator it has chosen, or the CPU."""
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    return (
        torch.device(kind, current_platform.current_device())
        if current_platform.is_cuda_alike()
        else torch.device(kind)
    )
