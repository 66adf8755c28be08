"""Copies between device and host, against a device that does nothing before it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embferry.connectors.vllm import device_copies
from embferry.connectors.vllm.device_copies import DeviceCopies

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


class Stream:
    """Work that the device was given, and has not done."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []

    def add(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def run(self) -> None:
        while self._work:
            self._work.pop(0)()

    def wait_stream(self, other: Stream) -> None:
        given = len(other._work)
        self.add(lambda: [other._work.pop(0)() for _ in range(min(given, len(other._work)))] and None)

    def record_event(self) -> SimpleNamespace:
        return SimpleNamespace(synchronize=self.run)


class Device:
    """Stands for a module such as ``torch.cuda``."""

    def __init__(self) -> None:
        self.compute = self.now = Stream()
        self.streams = [self.compute]

    def Stream(self) -> Stream:  # noqa: N802  (torch's name)
        self.streams.append(Stream())
        return self.streams[-1]

    def current_stream(self) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        yield
        self.now = before


class Tensor:
    """A tensor in page-locked memory or on the device. It has no values before the device has written them."""

    def __init__(self, device: Device, shape: Any, locked: bool = False) -> None:
        self.device, self.shape, self.dtype, self.locked = device, shape, np.float32, locked
        self.data: npt.NDArray[np.float32] = np.full(shape, np.nan, np.float32)
        self.used_on: list[Stream] = []

    def copy_(self, other: Any, non_blocking: bool = False) -> None:
        def copy() -> None:
            self.data[:] = other.data

        if non_blocking:
            assert self.locked, "from a device to ordinary memory a copy blocks"
            self.device.now.add(copy)
        else:
            copy()

    def to(self, device: str, non_blocking: bool) -> Tensor:
        assert device == "played"
        assert non_blocking
        assert self.locked
        made = Tensor(self.device, self.shape)
        self.device.now.add(lambda: made.data.__setitem__(slice(None), self.data))
        return made

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()

    def empty(shape: Any, dtype: Any, pin_memory: bool) -> Tensor:
        return Tensor(made, shape, locked=pin_memory)

    monkeypatch.setattr(device_copies, "torch", SimpleNamespace(empty=empty))
    return made


def computed(device: Device) -> Tensor:
    """Returns an output that the device has been asked to compute, and has not computed."""
    output = Tensor(device, VALUES.shape)
    device.compute.add(lambda: output.data.__setitem__(slice(None), VALUES))
    return output


def test_an_output_is_in_host_memory_when_its_copy_is_returned(device: Device) -> None:
    output = computed(device)
    host: Any = DeviceCopies("played", device).to_host(output)  # type: ignore[arg-type]  # stands for a tensor
    assert host.locked
    assert (host.data == VALUES).all()


def test_what_the_device_is_given_later_is_not_waited_for(device: Device) -> None:
    copies = DeviceCopies("played", device)
    host: Any = copies.to_host(computed(device))  # type: ignore[arg-type]  # stands for a tensor
    later: list[int] = []
    device.compute.add(lambda: later.append(1))
    copies.to_device(host)
    assert later == []


def test_a_loaded_embedding_is_there_for_computations_that_begin_afterwards(device: Device) -> None:
    rows = SimpleNamespace(shape=VALUES.shape, dtype=np.float32, data=VALUES.copy())
    made: Any = DeviceCopies("played", device).to_device(rows)  # type: ignore[arg-type]  # stands for a tensor
    rows.data[:] = -1  # the memory is used again at once
    assert np.isnan(made.data).all(), "the thread that steps the model has not waited"
    seen: list[npt.NDArray[np.float32]] = []
    device.compute.add(lambda: seen.append(made.data.copy()))
    device.compute.run()
    assert (seen[0] == VALUES).all()


def test_the_allocator_knows_both_streams(device: Device) -> None:
    """Otherwise it would give memory to others while the other stream still reads it."""
    copies, output = DeviceCopies("played", device), computed(device)
    copies.to_host(output)  # type: ignore[arg-type]  # stands for a tensor
    assert output.used_on == [device.streams[1]]
    made: Any = copies.to_device(SimpleNamespace(shape=VALUES.shape, dtype=np.float32, data=VALUES))  # type: ignore[arg-type]
    assert made.used_on == [device.compute]


def test_on_a_cpu_nothing_is_copied() -> None:
    copies, tensor = DeviceCopies("cpu", SimpleNamespace()), object()
    assert copies.to_host(tensor) is tensor  # type: ignore[arg-type,comparison-overlap]  # any object will do
    assert copies.to_device(tensor) is tensor  # type: ignore[arg-type,comparison-overlap]  # any object will do
