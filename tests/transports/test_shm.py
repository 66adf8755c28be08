"""The shm transport between processes that are killed or stopped during a write, and forged handles."""

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
from embferry.transports.shm import ShmTransport, revocation_table
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


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def writer_inside(pair: TransportPair, epoch: int, block: int) -> Iterator[subprocess.Popen[str]]:
    """Starts a process that has written half of a block and holds its lock."""
    with running("shm_writer.py", pair.handle.hex(), str(epoch), str(block)) as process:
        assert read_line(process) == "inside"
        yield process


def expect_not_revoked(pair: TransportPair) -> None:
    deadline = time.monotonic() + STILL_S
    while time.monotonic() < deadline:
        pair.receiver.poll()
        assert pair.receiver.events == []
        time.sleep(0.005)


def test_a_revocation_between_check_and_lock_stops_the_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer must check again under the lock, because the revocation may have been completed meanwhile."""
    fd, epochs = revocation_table.create(4)
    epochs[:] = 7
    real = revocation_table._lock

    def revoke_just_before(own: int, kind: int, first: int, count: int) -> bool:
        if kind == fcntl.F_RDLCK:
            epochs[:] = 0
            assert revocation_table.has_no_writers(fd, 0, 4)
        return real(own, kind, first, count)

    blocks, stop = np.arange(4), threading.Event()
    with revocation_table.locked_for_write(fd, epochs, 7, blocks, stop) as allowed:
        assert allowed
        assert not revocation_table.has_no_writers(fd, 3, 1)
        with revocation_table.locked_for_write(fd, epochs, 7, blocks, stop) as second:
            assert second, "two writes of one grant may write to a block"
        assert not revocation_table.has_no_writers(fd, 3, 1), "the end of one must not drop the lock of the other"
    assert revocation_table.has_no_writers(fd, 3, 1)
    monkeypatch.setattr(revocation_table, "_lock", revoke_just_before)
    with revocation_table.locked_for_write(fd, epochs, 7, blocks, stop) as allowed:
        assert not allowed
    os.close(fd)


@pytest.mark.integration
def test_a_writer_that_is_killed_does_not_block_revocation(pair: TransportPair) -> None:
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
    pair.expect(pair.lands(2, (3, 4)))


@pytest.mark.integration
@pytest.mark.parametrize("ending", ["continues", "dies"])
def test_a_stopped_writer_delays_revocation_until_it_continues_or_dies(pair: TransportPair, ending: str) -> None:
    pair.admit(1, (3,))
    pair.admit(2, (4,))
    with writer_inside(pair, 1, 3) as process:
        process.send_signal(signal.SIGSTOP)
        pair.receiver.transport.revoke(1)
        pair.receiver.transport.revoke(2)
        pair.receiver.revoked(2)  # others are not delayed
        pair.receiver.events.clear()
        expect_not_revoked(pair)
        if ending == "dies":
            process.kill()
        else:
            process.send_signal(signal.SIGCONT)
            assert process.stdin is not None
            print(file=process.stdin, flush=True)
            assert read_line(process) == "written"
        pair.receiver.revoked(1)
    pair.bytes[:] = CANARY
    pair.expect()


@pytest.mark.integration
def test_closing_raises_when_a_stopped_writer_does_not_leave(pair: TransportPair) -> None:
    pair.admit(1, (3,))
    with writer_inside(pair, 1, 3) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(TransportError, match="stopped writer"):
            pair.receiver.transport.close()
        pair.receiver.transport.close()


@pytest.mark.integration
def test_a_killed_receiver_is_a_lost_link_and_leaves_nothing() -> None:
    def shared_memory() -> set[str]:
        """Returns the names, but for those that Python gives: other tests make such memory meanwhile."""
        return {name for name in os.listdir("/dev/shm") if not name.startswith("psm_")}

    before = shared_memory()
    with running("receiver.py", "shm") as process:
        handle = bytes.fromhex(read_line(process))
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
    with pytest.raises(LocalProtocolError, match="shared"):
        transport.register(buffers)
    transport.close()
    buffers.close()


def unsealed() -> SharedFile:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SMALL.region_bytes)
    status = os.fstat(fd)
    return SharedFile(fd, status.st_dev, status.st_ino, status.st_size)


FORGERIES: list[tuple[Callable[[ShmHandle], dict[str, Any]], str]] = [
    (lambda h: {"boot_id": "another"}, "another host"),
    (lambda h: {"pid_namespace": h.pid_namespace + 1}, "pid namespace"),
    (lambda h: {"started": h.started + 1}, "ended"),
    (lambda h: {"pid": 1 << 30}, "No such process|Invalid argument"),
    (lambda h: {"region": msgspec.structs.replace(h.region, inode=h.region.inode + 1)}, "another file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, device=0)}, "another file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, fd=999_999)}, "No such file"),
    (lambda h: {"region": msgspec.structs.replace(h.region, size=h.region.size + 1)}, "another file"),
    (lambda h: {"region": h.table}, "do not fit"),
    (lambda h: {"life": h.region}, "not a pipe"),
    (lambda h: {"num_blocks": h.num_blocks + 1}, "damaged"),
    (lambda h: {"num_blocks": 1 << 32}, "damaged"),
    (lambda h: {"rows": ((0, 1 << 46),)}, "do not fit"),
    (lambda h: {"rows": ((0, 0),)}, "empty"),
    (lambda h: {"rows": ((0, 48), (40, 1))}, "overlap"),
]


@pytest.mark.parametrize(("forge", "match"), FORGERIES)
def test_a_forged_handle_is_refused(
    pair: TransportPair, forge: Callable[[ShmHandle], dict[str, Any]], match: str
) -> None:
    honest = msgspec.msgpack.decode(pair.handle, type=ShmHandle)
    handle = msgspec.msgpack.encode(msgspec.structs.replace(honest, **forge(honest)))
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=match) as caught:
        pair.sender.transport.connect(handle)
    assert not caught.value.retryable
    assert (
        len(os.listdir("/proc/self/fd")) <= descriptors
    )  # fewer, if descriptors of an earlier test are collected meanwhile


def test_memory_that_could_be_truncated_is_refused(pair: TransportPair) -> None:
    honest = msgspec.msgpack.decode(pair.handle, type=ShmHandle)
    region = unsealed()
    with pytest.raises(TransportError, match="truncated") as caught:
        pair.sender.transport.connect(msgspec.msgpack.encode(msgspec.structs.replace(honest, region=region)))
    os.close(region.fd)
    assert not caught.value.retryable


def test_close_reports_pending_revocations(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pair.receiver.transport.revoke(1)
    pair.receiver.transport.close()
    pair.receiver.poll()
    assert pair.receiver.events == [Revoked(1)]
