"""Sinks, callbacks and blocks used as they are not meant to be: refused at once, or at the cost of one transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embferry import Checksums, ChunkSink, EmbeddingReceiver, GatherSink, ReceiveManager, SendManager, Sink, wait
from embferry.memory.blocks import MetadataAllocation
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.states import KVPoll
from embferry.transfer.callbacks import CallbackThread
from embferry.transports.in_memory.transport import InMemoryTransport

from ..conftest import LAYOUT, SECONDS, Pair, embedding, kill, let_turn, same
from .scene import until, zeros

ROWS = embedding(40)


def arrives(pair: Pair, receiver: EmbeddingReceiver) -> None:
    receiver.init()
    pair.sender(receiver.room, ROWS)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), ROWS)


# A manager that is closed from its own threads


class Closing(GatherSink):
    """A sink that tries to close its manager from one of its methods."""

    def __init__(self, close: Callable[[], None], method: str) -> None:
        super().__init__(make=zeros)  # so that prepare() is called
        self.close, self.method = close, method
        self.refused: list[Exception] = []

    def __getattribute__(self, name: str) -> Any:
        if name == "method" or name != self.method:
            return super().__getattribute__(name)
        try:
            self.close()
        except LocalProtocolError as error:
            self.refused.append(error)
        return super().__getattribute__(name)


@pytest.mark.parametrize("method", ["granted", "needs_preparation", "verify", "deliver", "is_complete"])
def test_a_sink_that_closes_its_manager_is_refused_before_anything_is_closed(pair: Pair, method: str) -> None:
    sink = Closing(pair.receiving.close, method)
    arrives(pair, pair.receiver(sink=sink))
    assert "own thread" in str(sink.refused[0])
    arrives(pair, pair.receiver())


@pytest.mark.parametrize("end", ["receiving", "sending"])
def test_a_waker_that_closes_its_manager_is_refused(pair: Pair, end: str) -> None:
    manager, refused = getattr(pair, end), []
    receiver, sender = pair.receiver(7), pair.sending.open(7)

    def close() -> None:
        with pytest.raises(LocalProtocolError, match="own thread") as caught:
            manager.close()
        refused.append(caught.value)

    {"receiving": receiver, "sending": sender}[end].wake_on_change(close)
    receiver.init()
    sender.init(len(ROWS["fill_ids"]), b"digest")
    sender.send_embedding(ROWS)
    wait(receiver, SECONDS)
    wait(sender, SECONDS)
    assert refused
    arrives(pair, pair.receiver())


def test_the_callback_thread_may_close_the_manager(pair: Pair) -> None:
    closed = threading.Event()
    receiver = pair.receiver(7)
    receiver.init()
    pair.extra.append(SendManager(LAYOUT, [InMemoryTransport()]))
    sender = pair.extra[0].open(7)

    def close() -> None:
        pair.extra[0].close()
        closed.set()

    sender.on_change(close)
    sender.abort()
    assert closed.wait(SECONDS)


def test_a_bug_in_one_callback_costs_no_other() -> None:
    thread, run = CallbackThread("test-callbacks"), threading.Event()

    def raises() -> None:
        raise RuntimeError("a bug")

    thread.post(raises)
    thread.post(run.set)
    assert run.wait(SECONDS)
    thread.close()


# Sinks


class Falsy(GatherSink):
    """A sink that is empty, and so false, until it holds something."""

    def __len__(self) -> int:
        return 0


class Bare(Sink):
    """A sink that never calls ``super().__init__()``, and is complete when ``complete`` says so."""

    complete: Any = True

    @property
    def is_complete(self) -> Any:
        return self.complete

    def deliver(self, chunk: Any, total_tokens: int) -> None:
        self.owner.consumed(chunk.epoch, chunk.offset)

    def restart(self) -> None: ...


def used_before(pair: Pair) -> Sink:
    receiver = pair.receiver()
    arrives(pair, receiver)
    return receiver.sink


SINKS: dict[str, Callable[[Pair], Any]] = {
    "a class": lambda pair: GatherSink,
    "a function": lambda pair: zeros,
    "a list": lambda pair: [],
    "0": lambda pair: 0,
    "a text": lambda pair: "",
    "one that was used": used_before,
    "one in use": lambda pair: pair.receiver().sink,
    "a falsy one in use": lambda pair: pair.receiver(sink=Falsy()).sink,
}


@pytest.mark.parametrize("name", SINKS)
def test_a_sink_that_is_none_or_serves_another_transfer_is_refused(pair: Pair, name: str) -> None:
    sink = SINKS[name](pair)
    with pytest.raises(LocalProtocolError, match="sink"):
        pair.receiver(sink=sink)
    arrives(pair, pair.receiver())


def test_what_is_false_is_used_all_the_same(pair: Pair) -> None:
    class NoneTaken(Checksums):
        def __len__(self) -> int:
            return 0

    sink, checksums = Falsy(), NoneTaken(LAYOUT)
    receiver = pair.receiver(7, sink)
    assert receiver.sink is sink
    receiver.init()
    sender = pair.sending.open(7)
    sender.init(len(ROWS["fill_ids"]), b"digest")
    sender.send_embedding(ROWS, 16)
    sender.send_embedding(ROWS, checksums=checksums)
    assert sender._record.checksums is checksums
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), ROWS)


@pytest.mark.parametrize("value", [1, "yes", np.bool_(True), np.array([True])], ids=ascii)
def test_a_sink_is_complete_by_any_true_value(pair: Pair, value: Any) -> None:
    sink = Bare()
    sink.complete = value
    receiver = pair.receiver(7, sink)
    receiver.init()
    pair.sender(7, ROWS)
    wait(receiver, SECONDS)
    assert receiver._record.is_sink_complete is True


def test_an_is_complete_that_is_neither_true_nor_false_costs_its_transfer(pair: Pair) -> None:
    sink = Bare()
    sink.complete = np.array([True, False])
    receiver = pair.receiver(7, sink)
    receiver.init()
    sender = pair.sender(7, ROWS)
    for end in (receiver, sender):
        with pytest.raises(EmbeddingTransferError, match="is_complete"):
            wait(end, SECONDS)
    arrives(pair, pair.receiver())


def test_close_ends_a_transfer_whose_sink_is_not_complete() -> None:
    """Everything was verified, but the encode worker has died before it could take note of that."""
    sending = SendManager(LAYOUT, [InMemoryTransport()])
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()])
    pair, sink = Pair(receiving, sending, InMemoryTransport), Bare()
    sink.complete = False
    sink.deliver = lambda chunk, total: (kill(sending), Bare.deliver(sink, chunk, total))  # type: ignore[assignment]
    receiver = pair.receiver(7, sink)
    receiver.init()
    pair.sender(7, ROWS)
    deadline = time.monotonic() + SECONDS
    while receiver.machine.poll() is not KVPoll.Success:
        assert time.monotonic() < deadline
        let_turn(receiving)
    receiving.close()
    with pytest.raises(Aborted, match="shutting down"):
        wait(receiver, 0)
    sending.close()


# Blocks


def of(room: int, pair: Pair, tokens: int = 32) -> MetadataAllocation:
    allocation = pair.receiving.allocator.alloc(tokens, room)
    assert allocation is not None
    return allocation


def freed(pair: Pair) -> MetadataAllocation:
    allocation = of(7, pair)
    pair.receiving.allocator.free(allocation.blocks, 7)
    return allocation


def quarantined(pair: Pair) -> MetadataAllocation:
    allocation = of(7, pair)
    pair.receiving.allocator.quarantine(allocation.blocks, 7)
    return allocation


ALLOCATIONS: dict[str, Callable[[Pair], Any]] = {
    "of another room": lambda pair: of(8, pair),
    "of no room": lambda pair: MetadataAllocation((0, 1), 16),
    "given back": freed,
    "in quarantine": quarantined,
    "outside of the pool": lambda pair: MetadataAllocation((8, 9), 16),
    "of no numbers": lambda pair: MetadataAllocation(("a", "b"), 16),  # type: ignore[arg-type]
    "negative": lambda pair: MetadataAllocation((-1,), 16),
    "one of them twice": lambda pair: MetadataAllocation(of(7, pair).blocks[:1] * 2, 16),
    "one of them of another room": lambda pair: MetadataAllocation(of(7, pair).blocks + of(8, pair).blocks, 16),
    "of a pool with other blocks": lambda pair: MetadataAllocation(of(7, pair).blocks, 8),
    "empty": lambda pair: MetadataAllocation((), 16),
    "numbers alone": lambda pair: of(7, pair).blocks,
    "falsy": lambda pair: (),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("call", ["init", "resume_transfer"])
def test_blocks_that_a_room_does_not_hold_are_refused(pair: Pair, call: str, name: str) -> None:
    receiver, allocator = pair.receiver(7), pair.receiving.allocator
    sent = 0
    if call == "resume_transfer":
        receiver.init(of(7, pair, 16))
        pair.sender(7, ROWS)
        until(receiver, lambda: receiver.transferred_tokens >= 16)
        sent = 16
        with pytest.raises(LocalProtocolError):
            receiver.resume_transfer(ALLOCATIONS[name](pair), sent_tokens=sent)
        _give_back(pair)
        receiver.resume_transfer(sent_tokens=sent)
    else:
        with pytest.raises(LocalProtocolError):
            receiver.init(ALLOCATIONS[name](pair))
        assert receiver.poll() is KVPoll.Bootstrapping
        _give_back(pair)
        receiver.init()
        pair.sender(7, ROWS)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), ROWS)
    allocator.check_integrity()


def _give_back(pair: Pair) -> None:
    """Frees the blocks of the refused call, which the caller still holds."""
    allocator = pair.receiving.allocator
    with pair.receiving.lock:
        for room, blocks in allocator.holders().items():
            for block in blocks:
                free = allocator.release_quarantined if allocator.is_quarantined(block) else allocator.free
                free((block,), room)


def test_blocks_that_a_transfer_uses_are_not_granted_twice(pair: Pair) -> None:
    receiver = pair.receiver(7, ChunkSink())  # keeps its blocks until its chunks are released
    first = of(7, pair, 16)
    receiver.init(first)
    pair.sender(7, ROWS)
    until(receiver, lambda: receiver.transferred_tokens >= 16)
    with pytest.raises(LocalProtocolError):
        receiver.resume_transfer(first, sent_tokens=16)
    receiver.abort()


# Errors of callers


class Quota(Aborted):
    """An error with a constructor of its own, which no copy may call."""

    def __init__(self, used: int, allowed: int) -> None:
        super().__init__(f"{used} of {allowed} used")
        self.used, self.allowed = used, allowed


@pytest.mark.parametrize("end", ["receiver", "sender"])
def test_an_error_of_the_caller_s_own_class_is_raised_as_it_is(pair: Pair, end: str) -> None:
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sending.open(receiver.room)
    aborted = {"receiver": receiver, "sender": sender}[end]
    given = Quota(7, 5)
    aborted.abort(given)
    for _ in range(2):
        with pytest.raises(Quota) as caught:
            wait(aborted, SECONDS)
        assert caught.value is not given
        assert (caught.value.used, caught.value.allowed, str(caught.value)) == (7, 5, str(given))
    assert given.__traceback__ is None
