"""The connector's half in a worker: takes embeddings out of vLLM's encoder cache, and puts them in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .coordinates import digest_of
from .scheduler_side import StepMetadata
from .shared import SharedRows, attach
from .shelf import Item, ToShelf

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TO_SHELF_TIMEOUT = 10.0


class WorkerSide:
    """Made once a worker process. Of several ranks of a producer the first one publishes: all have the same."""

    def __init__(self, vllm_config: VllmConfig, name: str) -> None:
        self._publishes = vllm_config.ec_transfer_config.is_ec_producer and vllm_config.parallel_config.rank == 0
        self._shelf = ToShelf(name, TO_SHELF_TIMEOUT)

    def start_load_caches(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        for load in metadata.loads:
            if load.mm_hash not in encoder_cache:
                rows = torch.from_numpy(attach(load.place).copy())
                tensor = rows.view(getattr(torch, load.dtype)).reshape(load.place.tokens, load.width)
                encoder_cache[load.mm_hash] = tensor.to(_device())

    def start_save_caches(self, metadata: StepMetadata, encoder_cache: dict[str, torch.Tensor]) -> None:
        """What was encoded in an earlier step and the scheduler has given up since."""
        for mm_hash in metadata.publish:
            if mm_hash in encoder_cache:
                self.save_caches(encoder_cache, mm_hash)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str) -> None:
        """
        :raises TransportError: the scheduler does not take it.
        """
        if not self._publishes:
            return
        tensor = encoder_cache[mm_hash].detach()
        tensor = tensor.reshape(len(tensor), -1).contiguous().cpu()
        tokens, width = tensor.shape
        dtype = str(tensor.dtype).removeprefix("torch.")
        shared = SharedRows(tokens, width * tensor.element_size())
        np.copyto(shared.rows, tensor.view(torch.uint8).numpy())
        self._shelf.put(Item(mm_hash, shared.place, dtype, width, digest_of(shared.rows, dtype, width)))
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
