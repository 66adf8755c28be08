"""Tensors in device memory as a transfer reads and writes them.

Runs on tensors of any device. On a CPU it is tested; on a GPU, with pinned buffers and a stream of its own, it is
written and has not been run.
"""

from __future__ import annotations

import numpy as np
import torch


def pinned(nbytes: int) -> np.ndarray:
    """Host memory, uint8 ``[nbytes]``, that a GPU copies to and from at full speed; ordinary memory without a GPU."""
    memory: np.ndarray = torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()).numpy()
    return memory


class DeviceTensor:
    """A tensor ``[tokens, width]`` as one field of an embedding, to be sent from or received into.

    Make it after the work that fills the tensor has been queued, on the same stream: copies wait for that work, and for
    nothing that is queued later. For more tokens of the same tensor, make another.
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
        self._stream.synchronize()  # lets other threads run meanwhile
