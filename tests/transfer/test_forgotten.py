"""A transfer that is over is freed at once: nothing of it waits for the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from embferry import (
    Aborted,
    ChunkSink,
    EmbeddingReceiver,
    EmbeddingSender,
    Field,
    GatherSink,
    Geometry,
    KVPoll,
    Layout,
    ReceiveManager,
    SendManager,
    Sink,
    as_fields,
)
from embferry.testing.virtual import VirtualWorld
from embferry.testing.virtual_transport import VirtualTransport

LAYOUT = Layout((Field("input_embeddings", "float32", 8),))
ROWS = as_fields({"input_embeddings": np.arange(10 * 8, dtype=np.float32).reshape(10, 8)})
SECONDS = 60.0
"""Virtual time: longer than an end that is over lingers."""

Finish = Callable[[VirtualWorld, EmbeddingSender, EmbeddingReceiver], None]


def arrives(world: VirtualWorld, sender: EmbeddingSender, receiver: EmbeddingReceiver) -> None:
    sender.send_embedding(ROWS)
    assert world.run(SECONDS, lambda: receiver.poll() is KVPoll.Success)
    if isinstance(receiver.sink, GatherSink):
        assert receiver.arrays()["input_embeddings"].tobytes() == ROWS["input_embeddings"].tobytes()
    elif isinstance(receiver.sink, ChunkSink):
        while (chunk := receiver.sink.pop()) is not None:
            chunk.release()


def is_aborted_by_the_sender(world: VirtualWorld, sender: EmbeddingSender, receiver: EmbeddingReceiver) -> None:
    sender.abort()
    assert world.run(SECONDS, lambda: receiver.poll() is KVPoll.Failed)


def is_aborted_by_the_receiver(world: VirtualWorld, sender: EmbeddingSender, receiver: EmbeddingReceiver) -> None:
    receiver.abort(Aborted("enough"))
    assert world.run(SECONDS, lambda: sender.poll() is KVPoll.Failed)


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def transfer(
    world: VirtualWorld, sending: SendManager, receiving: ReceiveManager, sink: Sink, finish: Finish
) -> list[weakref.ref[object]]:
    """Makes a transfer, and returns references to its parts, all of which its caller has dropped."""
    sender = sending.open(7)
    sender.init(10, b"digest")
    receiver = receiving.open(7, sending.endpoint, sink)
    receiver.init()
    for end in (sender, receiver):
        end.on_change(partial(end.poll))  # a program that refers to the handle in what the handle calls
        end.wake_on_change(partial(end.poll))
    assert world.run(SECONDS, lambda: receiver.poll() is not KVPoll.Bootstrapping)
    finish(world, sender, receiver)
    sender.clear()
    receiver.clear()
    world.run(SECONDS)
    return [weakref.ref(part) for part in (sender, sender.machine, receiver, receiver.machine, receiver.sink)]


@pytest.mark.parametrize("sink", [GatherSink, partial(GatherSink, in_place=True), ChunkSink])
@pytest.mark.parametrize("finish", [arrives, is_aborted_by_the_sender, is_aborted_by_the_receiver])
@pytest.mark.usefixtures("_no_collector")
def test_a_transfer_is_freed_when_it_is_forgotten_and_its_handles_are_gone(
    sink: Callable[[], Sink], finish: Finish
) -> None:
    world = VirtualWorld(seed=1)
    encode, language = world.runtime(listens=True), world.runtime(name="language")
    sending = SendManager(LAYOUT, [VirtualTransport(encode)], runtime=encode)
    receiving = ReceiveManager(Geometry(LAYOUT, 4, 4), [VirtualTransport(language)], runtime=language)
    parts = transfer(world, sending, receiving, sink(), finish)
    assert [part() for part in parts] == [None] * len(parts)
    receiving.close()
    sending.close()
    assert not world.faults
