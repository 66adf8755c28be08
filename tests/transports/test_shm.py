"""Shared memory between real processes that are killed or stopped at the worst moment, and handles that lie."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.pair import CANARY, SMALL, Endpoint, TransportPair
from embferry.transports.contract import Revoked, Transport
from embferry.transports.shm import ShmTransport, gate
from embferry.transports.shm.peer import SharedFile, ShmHandle

HERE = Path(__file__).parent
STILL_S = 0.15  # how long something must not happen


def make(wake: Callable[[], None]) -> Transport:
    return ShmTransport(wake, close_timeout_s=0.2)


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    pair = TransportPair(make)
    yield pair
    pair.close()


@contextmanager
def running(script: str, *args: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(HERE / script), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def writer_inside(pair: TransportPair, epoch: int, block: int) -> Iterator[subprocess.Popen[str]]:
    """A process that has written half of a block and holds its lock."""
    with running("writer.py", pair.handle.hex(), str(epoch), str(block)) as process:
        assert line(process) == "inside"
        yield process


def expect_not_revoked(pair: TransportPair) -> None:
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        pair.receiver.poll()
        assert pair.receiver.events == []
        time.sleep(0.005)


def test_a_gate_that_closes_between_the_look_and_the_lock_keeps_the_writer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the writer looks again once it has the lock: the revocation has been completed meanwhile."""
    fd, gates = gate.create(4)
    gates[:] = 7
    real = gate._lock

    def revoke_just_before(own: int, kind: int, first: int, count: int) -> bool:
        if kind == fcntl.F_RDLCK:
            gates[:] = 0
            assert gate.writers_are_out(fd, 0, 4)
        return real(own, kind, first, count)

    everywhere, stop = np.arange(4), threading.Event()
    with gate.entered(fd, gates, 7, everywhere, stop) as allowed:
        assert allowed
        assert not gate.writers_are_out(fd, 3, 1)
        with gate.entered(fd, gates, 7, everywhere, stop) as second:
            assert second, "two writes of one grant may be in a block"
        assert not gate.writers_are_out(fd, 3, 1), "the end of one does not drop the other's lock"
    assert gate.writers_are_out(fd, 3, 1)
    monkeypatch.setattr(gate, "_lock", revoke_just_before)
    with gate.entered(fd, gates, 7, everywhere, stop) as allowed:
        assert not allowed
    os.close(fd)


@pytest.mark.integration
def test_a_writer_killed_in_the_middle_does_not_block_revocation(pair: TransportPair) -> None:
    pair.admit(1, (3,))
    with writer_inside(pair, 1, 3) as process:
        assert (pair.bytes != CANARY).any()
        pair.receiver.transport.revoke(1)
        expect_not_revoked(pair)
        with pytest.raises(LocalProtocolError, match="revoked"):
            pair.admit(2, (3, 4))
        process.kill()
        pair.receiver.revoked(1)
    pair.admit(2, (3, 4))
    pair.bytes[:] = CANARY
    pieces = pair.fill((3, 4))
    assert pair.write(2, (3, 4), pieces) is None
    pair.expect(pieces)


@pytest.mark.integration
@pytest.mark.parametrize("ending", ["continues", "dies"])
def test_a_stopped_writer_holds_up_revocation_until_it_continues_or_dies(pair: TransportPair, ending: str) -> None:
    pair.admit(1, (3,))
    pair.admit(2, (4,))
    with writer_inside(pair, 1, 3) as process:
        process.send_signal(signal.SIGSTOP)
        pair.receiver.transport.revoke(1)
        pair.receiver.transport.revoke(2)
        pair.receiver.revoked(2)  # others are not held up
        pair.receiver.events.clear()
        expect_not_revoked(pair)
        if ending == "dies":
            process.kill()
        else:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
            assert line(process) == "written"
        pair.receiver.revoked(1)
    pair.bytes[:] = CANARY
    pair.expect()


@pytest.mark.integration
def test_closing_names_a_stopped_writer_instead_of_waiting_for_ever(pair: TransportPair) -> None:
    pair.admit(1, (3,))
    with writer_inside(pair, 1, 3) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TransportError, match="give the region up"):
            pair.receiver.transport.close()
        pair.receiver.transport.close()


@pytest.mark.integration
def test_a_killed_owner_leaves_nothing_and_its_sender_learns_of_it() -> None:
    def shared_memory() -> set[str]:
        return set(os.listdir("/dev/shm"))

    before = shared_memory()
    with running("owner.py") as process:
        handle = bytes.fromhex(line(process))
        sender = Endpoint(make)
        sender.transport.connect(handle)
        pair = TransportPair(make)  # only for its pieces
        pieces = pair.fill((0, 1))
        pair.close()
        sender.transport.write(handle, 1, (0, 1), pieces, 7)
        assert sender.written(7) is None
        process.kill()
        lost = sender.lost()
        assert lost.handle == handle
        assert lost.error.retryable
        process.wait(30)
        with pytest.raises(TransportError) as caught:
            sender.transport.connect(handle)
        assert not caught.value.retryable
        sender.transport.close()
    assert shared_memory() == before


def test_private_memory_cannot_be_registered() -> None:
    buffers, transport = MultimodalDataBuffers(SMALL, shared=False), ShmTransport()
    with pytest.raises(LocalProtocolError, match="shared=True"):
        transport.register(buffers)
    transport.close()
    buffers.close()


def unsealed() -> SharedFile:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SMALL.region_bytes)
    status = os.fstat(fd)
    return SharedFile(fd, status.st_dev, status.st_ino, status.st_size)


LIES: list[tuple[Callable[[ShmHandle], dict[str, Any]], str]] = [
    (lambda h: {"boot_id": "another"}, "another host"),
    (lambda h: {"started": h.started + 1}, "ended"),
    (lambda h: {"pid": 1 << 30}, "No such process|Invalid argument"),
    (lambda h: {"region": msgspec.structs.replace(h.region, inode=h.region.inode + 1)}, "another file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, device=0)}, "another file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, fd=999_999)}, "No such file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, size=h.region.size + 1)}, "another file"),
    (lambda h: {"region": h.gates}, "do not fit"),
    (lambda h: {"life": h.region}, "not a pipe"),
    (lambda h: {"num_blocks": h.num_blocks + 1}, "damaged"),
    (lambda h: {"num_blocks": 1 << 32}, "damaged"),
    (lambda h: {"rows": ((0, 1 << 46),)}, "do not fit"),
    (lambda h: {"rows": ((0, 0),)}, "empty"),
    (lambda h: {"rows": ((0, 48), (40, 1))}, "overlap"),
]


@pytest.mark.parametrize(("lie", "match"), LIES)
def test_a_handle_that_lies_is_refused(
    pair: TransportPair, lie: Callable[[ShmHandle], dict[str, Any]], match: str
) -> None:
    honest = msgspec.msgpack.decode(pair.handle, type=ShmHandle)
    handle = msgspec.msgpack.encode(msgspec.structs.replace(honest, **lie(honest)))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=match) as caught:
        pair.sender.transport.connect(handle)
    assert not caught.value.retryable
    assert (
        len(os.listdir("/proc/self/fd")) <= descriptors
    )  # less, if what an earlier test had open is collected meanwhile


def test_memory_that_could_be_truncated_is_refused(pair: TransportPair) -> None:
    honest = msgspec.msgpack.decode(pair.handle, type=ShmHandle)
    region = unsealed()
    with pytest.raises(TransportError, match="truncated") as caught:
        pair.sender.transport.connect(msgspec.msgpack.encode(msgspec.structs.replace(honest, region=region)))
    os.close(region.fd)
    assert not caught.value.retryable


def test_pending_revocations_are_answered_by_close(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pair.receiver.transport.revoke(1)
    pair.receiver.transport.close()
    pair.receiver.poll()
    assert pair.receiver.events == [Revoked(1)]
