"""Copies of embeddings between a device and host memory, on a stream of their own.

A copy to or from ordinary host memory holds the thread that steps the model, and waits for everything that the device
was given before. From page-locked memory and on a second stream, the device copies while it computes: the thread goes
on, and only the computation that reads the embedding waits for it. On a CPU there is nothing to copy.

Not run yet: there was no device to run it on. The tests play a device that delays every copy until it is waited for.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


class DeviceCopies:
    """One in each worker. The thread that steps the model calls the methods.

    Args:
        device_type: the type of this worker's device, as torch calls it.
        device: the module of torch for that type, such as ``torch.cuda``.
    """

    def __init__(self, device_type: str, device: ModuleType | Any) -> None:
        self._type, self._device = device_type, device
        self._stream = None if device_type == "cpu" else device.Stream()

    def to_host(self, output: torch.Tensor) -> torch.Tensor:
        """Returns what the model has computed, in host memory, when it is all there.

        It waits for the computation of ``output`` and its copy, and for nothing that the device is given later.
        """
        if self._stream is None:
            return output
        host = self._locked(output.shape, output.dtype)
        self._stream.wait_stream(self._device.current_stream())  # the computation of the output
        with self._device.stream(self._stream):
            host.copy_(output, non_blocking=True)
            copied = self._stream.record_event()
        output.record_stream(self._stream)  # its memory is not given to others before the copy has read it
        copied.synchronize()
        return host

    def to_device(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on the device that computations given to it from now on find filled with ``rows``.

        ``rows`` may be written over when this returns: torch keeps the page-locked copy until the device has read it.
        """
        if self._stream is None:
            return rows
        host = self._locked(rows.shape, rows.dtype)
        host.copy_(rows)
        current = self._device.current_stream()
        with self._device.stream(self._stream):
            made = host.to(self._type, non_blocking=True)
        made.record_stream(current)  # its memory is not given to others before the computation has read it
        current.wait_stream(self._stream)
        return made

    def _locked(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
