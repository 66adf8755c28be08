"""Tensors in device memory as fields that a transfer reads and writes.

The code works on tensors of any device. It is tested on a CPU; the part for a GPU, which uses pinned buffers and a
stream of its own, has never been run.
"""

from __future__ import annotations

import numpy as np
import torch


def pinned(nbytes: int) -> np.ndarray:
    """Returns host memory, uint8 ``[nbytes]``, pinned for fast copies if there is a GPU."""
    memory: np.ndarray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    return memory


class DeviceTensor:
    """A tensor ``[tokens, width]`` as one field of an embedding, to send from or receive into.

    Create it on the stream that fills the tensor, after that work has been queued: copies wait for all work queued by
    then and for none queued later. For further tokens of the same tensor, create another.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dim() != 2 or not tensor.is_contiguous():
            raise ValueError(f"a field is a contiguous tensor [tokens, width], not {list(tensor.shape)}")
        self._bytes = tensor.view(torch.uint8)
        self._stream: torch.cuda.Stream | None = None
        if tensor.is_cuda:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]  # torch has not annotated it
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))

    @property
    def shape(self) -> tuple[int, int]:
        tokens, token_bytes = self._bytes.shape
        return int(tokens), int(token_bytes)

    def copy_out(self, start: int, stop: int, into: np.ndarray) -> None:
        self._copy(torch.from_numpy(into), self._bytes[start:stop])

    def copy_in(self, start: int, rows: np.ndarray) -> None:
        self._copy(self._bytes[start : start + len(rows)], torch.from_numpy(rows))

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()  # releases the GIL while it waits
