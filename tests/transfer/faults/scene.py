"""Five transfers over the same two managers: four that must not notice what happens to the fifth."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embferry import (
    ChunkSink,
    DeviceSink,
    EmbeddingReceiver,
    EmbeddingSender,
    Fields,
    GatherSink,
    ReceiveManager,
    SendManager,
    Sink,
    wait,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transfer.runtime import ThreadRuntime
from embferry.transports.contract import Transport
from embferry.transports.shm.transport import ShmTransport
from embferry.transports.tcp.transport import TcpTransport

from ..conftest import LAYOUT, SECONDS, embedding, same

TOKENS, FIRST = 48, 16
"""Tokens of an embedding, and those of its first chunk."""

SETTINGS = TransferSettings(
    chunk_bytes=FIRST * LAYOUT.token_bytes,
    retry_interval=0.02,
    retry_limit=0.1,
    linger=0.2,
    **dict.fromkeys(("answer_timeout", "peer_timeout", "transfer_timeout", "drain_timeout"), SECONDS),
)
"""Lost messages are repeated soon; no time-out of the transfer itself expires on a busy machine."""


class Device:
    """One field of an embedding in device memory, which is reached through copies alone."""

    def __init__(self, rows: np.ndarray) -> None:
        self.memory = rows.copy()

    @property
    def shape(self) -> tuple[int, int]:
        return self.memory.shape[0], self.memory.shape[1]

    def copy_out(self, start: int, stop: int, into: np.ndarray) -> None:
        into[:] = self.memory[start:stop]

    def copy_in(self, start: int, rows: np.ndarray) -> None:
        self.memory[start : start + len(rows)] = rows


def zeros(total: int) -> dict[str, np.ndarray]:
    return {f.name: np.zeros((total, f.token_bytes), np.uint8) for f in LAYOUT.fields}


def device_sink() -> DeviceSink:
    return DeviceSink(lambda total: {name: Device(rows) for name, rows in zeros(total).items()})


@dataclass
class Transfer:
    """Both ends of one transfer, and what it carries."""

    receiver: EmbeddingReceiver
    sender: EmbeddingSender
    rows: Fields
    source: Any = None

    def send(self, tokens: int | None = None) -> None:
        self.sender.send_embedding(self.source or self.rows, tokens)

    def arrived(self) -> Fields:
        """Returns what the sink has, wherever it keeps it."""
        sink = self.receiver.sink
        if isinstance(sink, DeviceSink):
            return {name: target.memory for name, target in sink.targets.items()}
        if isinstance(sink, GatherSink):
            return self.receiver.arrays()
        assert isinstance(sink, ChunkSink)
        rows = zeros(TOKENS)
        while (chunk := sink.pop()) is not None:
            for name, array in sink.read(chunk).items():
                rows[name][chunk.offset : chunk.offset + chunk.length] = array
            chunk.release()
        return rows

    def arrives(self) -> None:
        """Waits for the end, and checks the bytes."""
        wait(self.receiver, SECONDS)
        assert same(self.arrived(), self.rows)

    def clear(self) -> None:
        if isinstance(self.receiver.sink, DeviceSink):
            self.receiver.sink.close()
        self.receiver.clear()
        self.sender.clear()


@dataclass
class Scene:
    """Two managers joined by two transports.

    Attributes:
        receiving: Receives.
        sending: Sends.
        carriers: The preferred transport of each: the sending one's, the receiving one's.
        managers: All of them, also those made later.
        room: Of the transfer that is hit.
    """

    receiving: ReceiveManager
    sending: SendManager
    carriers: dict[str, Transport]
    managers: list[ReceiveManager | SendManager] = field(default_factory=list)
    others: list[Transfer] = field(default_factory=list)
    room: int = field(default_factory=lambda: secrets.randbits(60))

    def begin(
        self,
        sink: Sink | None = None,
        *,
        room: int | None = None,
        sending: SendManager | None = None,
        source: Callable[[Fields], Any] | None = None,
        meet: Callable[[EmbeddingReceiver, EmbeddingSender], None] = lambda receiver, sender: None,
        digest: bytes = b"digest",
    ) -> Transfer:
        """Begins a transfer of which the first chunk is ready. ``meet`` sees both ends before either does anything."""
        room = self.room if room is None else room
        rows = embedding(TOKENS, seed=room)
        sending = sending or self.sending
        with self.receiving.lock, sending.lock:
            receiver = self.receiving.open(room, sending.endpoint, sink)
            sender = sending.open(room)
            receiver.init()
            meet(receiver, sender)
            sender.init(TOKENS, digest)
        transfer = Transfer(receiver, sender, rows, source(rows) if source else None)
        transfer.send(FIRST)
        return transfer

    def begin_others(self, count: int = 4) -> None:
        """Begins the others, and waits until a third of each has arrived."""
        self.others = [self.begin(room=secrets.randbits(60)) for _ in range(count)]
        for other in self.others:
            until(other.receiver, lambda other=other: other.receiver.transferred_tokens == FIRST)

    def finish_others(self) -> None:
        for other in self.others:
            other.send()
        for other in self.others:
            other.arrives()
            wait(other.sender, SECONDS)
            other.clear()

    def another_sender(self) -> SendManager:
        """Returns another encode worker."""
        manager = SendManager(LAYOUT, [TcpTransport(), ShmTransport()], settings=SETTINGS)
        self.managers.append(manager)
        return manager

    def pool_becomes_whole(self) -> bool:
        deadline = time.monotonic() + SECONDS
        while self.receiving.allocator.available < self.receiving.geometry.num_blocks:
            if time.monotonic() > deadline:
                return False
            self.receiving.wake()
            threading.Event().wait(0.001)
        return True


def until(end: EmbeddingReceiver | EmbeddingSender, condition: Callable[[], object]) -> None:
    """Waits until ``condition()`` holds. Checks it whenever ``end`` changes."""
    changed = threading.Event()
    stop_waking = end.wake_on_change(changed.set)
    while not condition():
        assert changed.wait(SECONDS), "nothing changed"
        changed.clear()
    stop_waking()


def control_of(manager: ReceiveManager | SendManager) -> Any:
    runtime = manager._runtime
    assert isinstance(runtime, ThreadRuntime)
    return runtime.control


def make_scene(**settings: float) -> Scene:
    receives, sends = TcpTransport(), TcpTransport()
    receiving = ReceiveManager(Geometry(LAYOUT, 32, FIRST), [receives, ShmTransport()], settings=SETTINGS)
    sending = SendManager(LAYOUT, [sends, ShmTransport()], settings=SETTINGS)
    return Scene(receiving, sending, {"receiving": receives, "sending": sends}, [sending, receiving])


def _open() -> Counter[str]:
    """Returns what this process holds that must be given back: descriptors, threads, names in /dev/shm."""
    held: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held[os.readlink(f"/proc/self/fd/{fd}")] += 1
    held.update(f"thread {thread.name}" for thread in threading.enumerate())
    held.update(name for name in os.listdir("/dev/shm") if str(os.getpid()) in name)
    return held


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    """Checks that everything that is opened within is closed at the end."""
    before = _open()
    yield
    deadline = time.monotonic() + SECONDS
    while left := {what for what in _open() - before if not what.startswith("/proc")}:
        gc.collect()
        assert time.monotonic() < deadline, f"left open: {sorted(left)}"
        threading.Event().wait(0.005)
