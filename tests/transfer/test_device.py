"""Embeddings in device memory, by a test double whose memory is reached only through copies."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from embferry import DeviceSink, Fields, GatherSink, wait
from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.states import KVPoll
from embferry.transfer.staging import Staging

from .conftest import LAYOUT, SECONDS, MakePair, embedding, let_turn, same

pytestmark = pytest.mark.usefixtures("checksums")

CHUNK = 16 * LAYOUT.token_bytes


class Device:
    """One field of an embedding in device memory. A copy that includes the token ``fails_at`` fails."""

    def __init__(self, rows: np.ndarray, *, fails_at: int = -1) -> None:
        self.memory = rows.copy()
        self.fails_at = fails_at
        self.copied: list[tuple[int, int]] = []

    @property
    def shape(self) -> tuple[int, int]:
        return self.memory.shape[0], self.memory.shape[1]

    def copy_out(self, start: int, stop: int, into: np.ndarray) -> None:
        if start <= self.fails_at < stop:
            raise RuntimeError("an illegal memory access was encountered")
        self.copied.append((start, stop))
        into[:] = self.memory[start:stop]

    def copy_in(self, start: int, rows: np.ndarray) -> None:
        if start <= self.fails_at < start + len(rows):
            raise RuntimeError("an illegal memory access was encountered")
        self.copied.append((start, start + len(rows)))
        self.memory[start : start + len(rows)] = rows


def on_device(rows: Fields, fails_at: int = -1) -> dict[str, Device]:
    return {name: Device(array, fails_at=fails_at) for name, array in rows.items()}


def test_an_embedding_crosses_from_device_to_device_through_bounded_buffers(make_pair: MakePair) -> None:
    rows = embedding(400)
    made: list[int] = []

    def allocate(nbytes: int) -> np.ndarray:
        made.append(nbytes)
        return np.empty(nbytes, np.uint8)

    pair = make_pair(num_blocks=8, chunk_bytes=CHUNK, writes_in_flight=2)
    pair.sending.writer._allocate = allocate
    copied = threading.Event()
    targets: dict[str, Device] = {}

    def make(total: int) -> dict[str, Device]:
        targets.update({f.name: Device(np.zeros((total, f.token_bytes), np.uint8)) for f in LAYOUT.fields})
        return targets

    sink = DeviceSink(make, copied.set)
    receiver = pair.receiver(sink=sink)
    receiver.init()
    sender = pair.sending.open(receiver.room)
    sender.init(400, b"digest")
    source = on_device(rows)
    sender.send_embedding(source)
    wait(receiver, SECONDS)
    while sink.copied_tokens < 400:
        assert copied.wait(SECONDS)
        copied.clear()
    sink.close()
    assert same({name: target.memory for name, target in targets.items()}, rows)
    assert sum(made) == 2 * CHUNK  # as many buffers as writes in flight, for any length
    assert sorted(source["fill_ids"].copied) == [(at, at + 16) for at in range(0, 400, 16)]
    receiver.clear()
    wait(sender, SECONDS)


class LateSink(GatherSink):
    """Completes long after every block has been returned, as if it copied from buffers of its own."""

    has_copied = False

    @property
    def is_complete(self) -> bool:
        return self.has_copied


@pytest.mark.parametrize("ends", ["completes", "cleared", "closed"])
def test_a_transfer_is_kept_until_its_sink_is_complete(make_pair: MakePair, ends: str) -> None:
    rows, sink, woken = embedding(50), LateSink(), threading.Event()
    pair = make_pair(linger=0.01)
    receiver = pair.receiver(sink=sink)
    receiver.init()
    sender = pair.sender(receiver.room, rows)
    wait(sender, SECONDS)
    machine = receiver.machine
    while not machine.settled(pair.receiving.now()):
        let_turn(pair.receiving)
    let_turn(pair.receiving)
    assert pair.receiving._records() == [receiver._record]
    receiver.wake_on_change(woken.set)
    if ends == "completes":
        sink.has_copied = True
        pair.receiving.touch(receiver._record)
        wait(receiver, SECONDS)
        return
    if ends == "cleared":
        receiver.clear()
        let_turn(pair.receiving)
        assert pair.receiving._records() == []
    else:
        pair.receiving.close()
    assert woken.is_set()
    assert receiver.poll() is KVPoll.Failed


def test_an_embedding_may_have_fields_on_the_host_and_on_the_device(make_pair: MakePair) -> None:
    rows = embedding(50)
    pair = make_pair()
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sending.open(receiver.room)
    sender.init(50, b"digest")
    sender.send_embedding(rows | {"input_embeddings": Device(rows["input_embeddings"])}, 20)
    sender.send_embedding(rows | {"input_embeddings": Device(rows["input_embeddings"])}, 50)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)


def test_a_device_that_fails_to_copy_out_ends_only_its_transfer(make_pair: MakePair) -> None:
    pair = make_pair(chunk_bytes=CHUNK)
    rows = embedding(100)
    receiver, other = pair.receiver(), pair.receiver()
    for one in (receiver, other):
        one.init()
    sender = pair.sending.open(receiver.room)
    sender.init(100, b"digest")
    sender.send_embedding(on_device(rows, fails_at=40))
    with pytest.raises(LocalProtocolError, match="illegal memory access"):
        wait(receiver, SECONDS)
    assert sender.poll() is KVPoll.Failed
    pair.sender(other.room, rows)
    wait(other, SECONDS)
    assert same(other.arrays(), rows)


def test_a_device_that_fails_to_copy_in_ends_the_transfer(make_pair: MakePair) -> None:
    pair = make_pair(chunk_bytes=CHUNK)
    sink = DeviceSink(lambda total: on_device(embedding(total), fails_at=40))
    receiver = pair.receiver(sink=sink)
    receiver.init()
    pair.sender(receiver.room, embedding(400))
    with pytest.raises(LocalProtocolError, match="illegal memory access"):
        wait(receiver, SECONDS)
    sink.close()


def test_a_staged_chunk_waits_for_a_buffer_and_keeps_it_until_released() -> None:
    woken = threading.Semaphore(0)
    staging: Staging[int] = Staging(LAYOUT, chunk_bytes=CHUNK, slots=2, wake=woken.release)
    rows = embedding(64)
    for key in range(4):
        staging.submit(key, on_device(rows), 16 * key, 16 * key + 16)
    assert all(woken.acquire(timeout=SECONDS) for _ in range(2))
    assert not woken.acquire(blocking=False)
    first, second = staging.finished()
    assert (first.key, second.key) == (0, 1)
    staging.release(first.slot)
    assert woken.acquire(timeout=SECONDS)
    (third,) = staging.finished()
    assert (third.key, third.slot) == (2, first.slot)
    for staged in (second, third):
        at = 16 * staged.key
        assert same(dict(staged.rows), {name: array[at : at + 16] for name, array in rows.items()})
    staging.close()
