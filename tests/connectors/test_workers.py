"""The channel between a scheduler and its workers: what they send is checked, and what fails is one embedding."""

from __future__ import annotations

import errno
import gc
import os
import socket
import uuid
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import TransportError
from embferry.connectors.shared import shared_rows
from embferry.connectors.shared.shape import Shape, digest_of
from embferry.connectors.shared.shared_rows import SharedRows
from embferry.connectors.vllm import channel, workers
from embferry.connectors.vllm.channel import Done, Enlist, Publish
from embferry.connectors.vllm.rank_memory import RankMemory
from embferry.memory.memfd import sealed_memfd

from .pair import CONFIG, GUARD_S, SHAPE, Encode, Pair, rows_like, until

pytestmark = pytest.mark.integration

SIZE = SHAPE.nbytes + 8
"""Bytes of the memory of an embedding for one rank."""
GOOD = Publish("a", SHAPE, b"0" * 16)


def descriptors() -> int:
    """Returns how many are open. Those of earlier tests may be closed at any time, so fewer are as good."""
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def encode() -> Iterator[Encode]:
    with closing(Encode()) as made:
        yield made


def packed(**changes: Any) -> bytes:
    """Returns a packet of a worker, changed without regard to what is allowed."""
    plain = msgspec.msgpack.decode(msgspec.msgpack.encode(GOOD))
    return msgspec.msgpack.encode(plain | changes)


def shaped(tokens: object = SHAPE.tokens, width: object = SHAPE.width, dtype: object = SHAPE.dtype) -> bytes:
    return packed(shape=[tokens, width, dtype])


PACKETS = {
    "no packet": b"\xc1",
    "deep nesting": b"\x91" * 8000,
    "another type": msgspec.msgpack.encode({"type": "Other"}),
    "too long": b"\x00" * (channel.MAX_PACKET + 1),
    "negative tokens": shaped(tokens=-4),
    "no tokens": shaped(tokens=0),
    "negative width": shaped(width=-16),
    "huge count": shaped(tokens=(1 << 64) - 1),
    "more than the memory": shaped(tokens=SHAPE.tokens + 1),
    "more than any memory": shaped(tokens=1 << 39, width=1 << 20),
    "less than the memory": shaped(tokens=1),
    "a float": shaped(tokens=4.5),
    "an unknown dtype": shaped(dtype="float128"),
    "a dtype that is no text": shaped(dtype=7),
    "a short digest": packed(digest=b"d"),
    "no name": packed(mm_hash=""),
    "a long name": packed(mm_hash="n" * (channel.MAX_HASH + 1)),
    "an answer to nothing": msgspec.msgpack.encode(Done(1 << 62)),
    "a rank that does not exist": msgspec.msgpack.encode(Enlist(1)),
}


def answer(name: str, packet: bytes, *fds: int) -> Done | None:
    """Sends a packet as a worker does. Returns the answer; None: the connection has ended without one."""
    with channel.connect(name, GUARD_S) as sock:
        sock.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else [])
        sock.shutdown(socket.SHUT_WR)
        received = channel.receive(sock, channel.from_scheduler)
    if received is None:
        return None
    assert isinstance(received[0], Done)
    return received[0]


def still_takes(encode: Encode) -> None:
    """The channel goes on: another worker's embedding arrives."""
    encode.publish("good", 3)
    assert encode.producer.cache.find("good") is not None


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS.keys())
def test_a_malformed_packet_is_refused_and_harms_nothing(encode: Encode, packet: bytes) -> None:
    fd = sealed_memfd("test", SIZE)
    before = descriptors()
    found = answer(encode.name, packet, fd)
    assert found is None or found.error
    assert found is not None or b"Done" in packet
    until(lambda: descriptors() <= before)
    assert encode.producer.cache.nbytes == 0
    os.close(fd)
    still_takes(encode)


def unsealed() -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, SIZE)
    return fd


def of_file(path: Path) -> int:
    path.write_bytes(bytes(SIZE))
    return os.open(path, os.O_RDWR)


def sealed_read_only() -> int:
    fd = sealed_memfd("test", SIZE)
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


MEMORY: dict[str, Callable[[Path], int]] = {
    "a pipe": lambda path: os.open("/dev/null", os.O_RDWR),
    "a folder": lambda path: os.open(path.parent, os.O_RDONLY),
    "a file": of_file,
    "memory that can be cut short": lambda path: unsealed(),
    "memory that is too short": lambda path: sealed_memfd("test", SIZE - 8),
    "memory that is too long": lambda path: sealed_memfd("test", SIZE + 8),
    "memory for reading": lambda path: sealed_read_only(),
}


@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY.keys())
def test_a_descriptor_of_something_else_is_refused(encode: Encode, tmp_path: Path, make: Callable[[Path], int]) -> None:
    fd = make(tmp_path / "file")
    before = descriptors()
    with pytest.raises(TransportError):
        channel.publish(encode.name, GOOD, fd, GUARD_S)
    until(lambda: descriptors() <= before)
    os.close(fd)
    still_takes(encode)


@pytest.mark.parametrize("count", [0, 2, 50])
def test_one_descriptor_comes_with_an_embedding(encode: Encode, count: int) -> None:
    fd = sealed_memfd("test", SIZE)
    before = descriptors()
    found = answer(encode.name, msgspec.msgpack.encode(GOOD), *[fd] * count)
    assert found is not None
    assert found.error
    until(lambda: descriptors() <= before)
    os.close(fd)
    still_takes(encode)


def test_a_process_of_another_user_is_refused(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    with channel.new_socket() as sock, closing(SharedRows.make(SHAPE, ranks=1)) as shared:
        monkeypatch.setattr(channel, "own_user", lambda: os.geteuid() + 1)
        sock.settimeout(GUARD_S)
        sock.connect(channel.address(encode.name))
        try:
            channel.send(sock, GOOD, shared.fd)
            found = channel.receive(sock, channel.from_scheduler)
        except OSError:
            found = None
        assert found is None or (isinstance(found[0], Done) and "of user" in found[0].error)
    assert encode.producer.cache.nbytes == 0
    monkeypatch.undo()
    still_takes(encode)


def test_a_worker_gives_nothing_to_the_scheduler_of_another_user(
    encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any process can take the address before the scheduler does."""
    monkeypatch.setattr(channel, "own_user", lambda: os.geteuid() + 1)
    with pytest.raises(TransportError, match="of user"):
        encode.publish("a")


def test_memory_that_cannot_be_mapped_fails_one_embedding(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    with closing(SharedRows.make(SHAPE, ranks=1)) as shared:
        monkeypatch.setattr(shared_rows, "_mapped", exhausted)
        with pytest.raises(TransportError, match="no memory or descriptors"):
            channel.publish(encode.name, GOOD, shared.fd, GUARD_S)
    monkeypatch.undo()
    still_takes(encode)


def test_an_embedding_beyond_the_limit_is_refused() -> None:
    with closing(Encode(msgspec.structs.replace(CONFIG, max_embedding_bytes=SHAPE.nbytes - 1))) as encode:
        with pytest.raises(TransportError, match="max_embedding_bytes"):
            encode.publish("a")
        assert encode.producer.cache.nbytes == 0


def test_connections_are_bounded_and_idle_ones_end(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "MAX_CONNECTIONS", 4)
    idle = [channel.connect(encode.name, GUARD_S) for _ in range(4)]
    until(lambda: len(encode.workers._connections) == 4)
    with pytest.raises(TransportError):
        encode.publish("a")
    for sock in idle[:1]:
        sock.close()
    until(lambda: len(encode.workers._connections) == 3)
    still_takes(encode)
    monkeypatch.setattr(workers, "IDLE_S", 0.01)
    encode.workers._thread.call(encode.workers._end_idle)
    until(lambda: not encode.workers._connections)
    for sock in idle[1:]:
        sock.close()


def test_two_engines_of_one_name_are_told_apart(encode: Encode) -> None:
    with pytest.raises(TransportError, match=encode.name):
        workers.Workers(encode.name, ranks=1)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with closing(Pair(CONFIG)) as made:
        yield made


def test_a_rank_that_cannot_map_an_embedding_fails_its_request_alone(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    pair.publish("a")
    monkeypatch.setattr(pair.rank, "_map", lambda packet, fd: (os.close(fd), exhausted()))
    with pytest.raises(TransportError, match="rank 0 cannot map"):
        pair.fetch("r", "a", pair.offer("a"))
    monkeypatch.undo()
    assert np.array_equal(pair.fetch("s", "a", pair.offer("a")), rows_like(0))


def test_a_rank_that_has_ended_fails_requests_at_once(pair: Pair) -> None:
    pair.publish("a")
    until(lambda: any(one.rank == 0 for one in pair.consumer_workers._connections))
    pair.rank.close()
    with pytest.raises(TransportError, match="rank 0 of this engine is gone"):
        pair.fetch("r", "a", pair.offer("a"))


def test_a_rank_that_never_connects_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on another host, for example."""
    monkeypatch.setattr(workers, "MAP_S", 0.01)
    made = workers.Workers(uuid.uuid4().hex, ranks=2)
    with closing(made), closing(SharedRows.make(SHAPE, ranks=2)) as shared:
        made.share(shared)

        def has_failed() -> bool:
            try:
                return made.is_mapped(shared)
            except TransportError as error:
                return "rank 0, 1 did not map" in error.detail

        until(has_failed)


def test_a_request_does_not_run_before_its_embedding_is_mapped(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    released, mapped = os.eventfd(0), pair.rank._map

    def slow(packet: channel.Map, fd: int) -> None:
        os.eventfd_read(released)
        mapped(packet, fd)

    monkeypatch.setattr(pair.rank, "_map", slow)
    pair.publish("a")
    coordinates = pair.offer("a")
    until(lambda: pair.consumer.require("r", "a", coordinates) or pair.consumer.find("a") is not None)
    assert not pair.consumer.require("r", "a", coordinates)
    os.eventfd_write(released, 1)
    assert np.array_equal(pair.fetch("r", "a", coordinates), rows_like(0))
    os.close(released)


def test_a_rank_that_connects_late_is_given_what_it_has_missed() -> None:
    shape = Shape(3, 5, "uint8")
    name = uuid.uuid4().hex
    made = workers.Workers(name, ranks=1)
    with closing(made), closing(SharedRows.make(shape, ranks=1)) as shared:
        shared.rows[:] = 7
        made.share(shared)
        assert not made.is_mapped(shared)
        with closing(RankMemory(name, 0)) as rank:
            until(lambda: made.is_mapped(shared))
            assert digest_of(rank.find(shared.key).rows, shape) == digest_of(shared.rows, shape)


def test_closed_memory_leaves_no_descriptor_and_no_mapping(pair: Pair) -> None:
    def round_trip(seed: int) -> None:
        pair.publish("a", seed)
        pair.fetch("r", "a", pair.offer("a"))
        pair.consumer.release("r")
        pair.consumer._drop("a", "")
        until(lambda: pair.rank._mapped == {} and pair.consumer_workers._sharings == {})
        until(lambda: pair.producer.offers.nbytes == 0)

    round_trip(0)  # makes the managers
    before = descriptors()
    for seed in range(1, 4):
        round_trip(seed)
    until(lambda: descriptors() <= before)
