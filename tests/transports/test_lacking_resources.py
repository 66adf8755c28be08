"""A process without descriptors, memory or threads: a transport tries again, or says what is lacking."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import TransportError
from embferry.testing.pair import LARGE, SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import Written
from embferry.transports.net import listener, loop
from embferry.transports.shm import peer as shm_peer
from embferry.transports.shm import revocation_table
from embferry.transports.shm import transport as shm
from tests.transports.test_failures import connect, make, remains, transports
from tests.trust.raw import read_hello

pytestmark = pytest.mark.integration


def out_of(code: int) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return call


CONNECTING: list[Any] = [
    pytest.param("tcp", socket, "socket", id="tcp: socket"),
    pytest.param("tcp", loop.Scope, "watch", id="tcp: watch"),
    pytest.param("http", socket, "socket", id="http: socket"),
    pytest.param("shm", os, "pidfd_open", id="shm: process"),
    pytest.param("shm", os, "open", id="shm: open"),
    pytest.param("shm", mmap, "mmap", id="shm: map"),
    pytest.param("shm", shm_peer, "boot_id", id="shm: boot id"),
    pytest.param("nixl", socket, "socket", id="nixl: socket", marks=pytest.mark.engines),
    pytest.param("mooncake", socket, "socket", id="mooncake: socket", marks=pytest.mark.engines),
]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM], ids=["EMFILE", "ENOMEM"])
@pytest.mark.parametrize(("name", "owner", "call"), CONNECTING)
def test_a_connection_for_which_resources_are_lacking_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, name: str, owner: Any, call: str, code: int
) -> None:
    pair = TransportPair(lambda wake: make(name, wake))
    pair.sender.transport.disconnect(pair.handle)
    pair.admit(1, (0,))
    pieces = pair.fill((0,))
    caught: TransportError | None = None
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, out_of(code))
        try:
            pair.sender.transport.connect(pair.handle)
        except TransportError as error:
            caught = error
        if caught is None:
            caught = pair.write(1, (0,), pieces)
    assert caught is not None
    assert caught.retryable
    connect(pair)
    eventually(lambda: (connect(pair), pair.write(1, (0,), pieces) is None)[1])  # type: ignore[func-returns-value]
    pair.expect(pieces)
    pair.sender.poll()
    pair.close()


LISTENING: list[Any] = [
    "tcp",
    "http",
    pytest.param("nixl", marks=pytest.mark.engines),
    pytest.param("mooncake", marks=pytest.mark.engines),
]


@pytest.mark.parametrize("name", LISTENING)
def test_a_listener_whose_socket_cannot_be_watched_at_first_accepts_later(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    has_failed, watch = threading.Event(), loop.Scope.watch

    def failing(scope: loop.Scope, fd: int, events: int, ready: Any) -> None:
        if getattr(ready, "__func__", None) is listener.Listener._accept and not has_failed.is_set():
            has_failed.set()
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        watch(scope, fd, events, ready)

    monkeypatch.setattr(listener, "RESTART_S", 0.01)
    monkeypatch.setattr(loop.Scope, "watch", failing)
    pair = TransportPair(lambda wake: make(name, wake))
    pair.admit(1, (0,))
    pieces = pair.fill((0,))
    assert pair.write(1, (0,), pieces) is None
    assert has_failed.is_set()
    pair.expect(pieces)
    pair.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM], ids=["EMFILE", "ENOMEM"])
def test_a_write_over_shm_for_which_resources_are_lacking_can_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    pair = TransportPair(lambda wake: make("shm", wake))
    pair.admit(1, (0,))
    pieces = pair.fill((0,))
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", out_of(code))
        pair.expect_retryable(pair.write(1, (0,), pieces))
    assert pair.write(1, (0,), pieces) is None
    pair.close()


def test_a_copy_for_which_no_thread_can_be_started_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = TransportPair(lambda wake: make("shm", wake), LARGE)
    blocks = tuple(range(64))
    pair.admit(1, blocks)
    pieces = pair.fill(blocks)

    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        pair.expect_retryable(pair.write(1, blocks, pieces))
    assert pair.write(1, blocks, pieces) is None
    pair.expect(pieces)
    assert len([event for event in pair.sender.events if isinstance(event, Written)]) == 2
    pair.close()


@pytest.mark.parametrize("name", list(transports()))
def test_a_transport_that_lacks_descriptors_is_a_transport_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    before = remains()[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "eventfd", out_of(errno.EMFILE))
        with pytest.raises(TransportError):
            make(name, lambda: None)
    assert remains()[0] <= before


@pytest.mark.parametrize("call", ["pipe2", "memfd_create", "fstat"])
def test_a_region_for_which_descriptors_are_lacking_leaves_none_open(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    region, transport = MultimodalDataBuffers(SMALL, shared=True), make("shm", lambda: None)
    before = remains()[0]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, out_of(errno.EMFILE))
        with pytest.raises(TransportError):
            transport.register(region)
    assert remains()[0] == before
    assert transport.register(region)
    transport.close()
    region.close()


def test_a_revocation_waits_while_the_kernel_has_no_memory_for_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = TransportPair(lambda wake: make("shm", wake))
    pair.admit(1, (0,))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "fcntl", out_of(errno.ENOLCK))
        pair.receiver.transport.revoke(1)
        pair.receiver.poll()
        assert pair.receiver.events == []
    pair.receiver.revoked(1)
    pair.close()


def test_a_receiver_that_is_stopped_with_the_lock_does_not_hold_a_copy_up_for_good() -> None:
    pair = TransportPair(lambda wake: shm.ShmTransport(wake, stall_timeout_s=0.1))
    pair.admit(1, (3,))
    receiver = pair.receiver.transport._receiving  # type: ignore[attr-defined]
    assert revocation_table._lock(receiver.table_fd, fcntl.F_WRLCK, 3, 1)
    pair.expect_retryable(pair.write(1, (3,), pair.fill((3,))))
    pair.expect()
    revocation_table._lock(receiver.table_fd, fcntl.F_UNLCK, 3, 1)
    pair.lands(1, (3,))
    pair.close()


def test_an_accept_without_descriptors_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that have not introduced themselves go first, then idle ones."""
    pair = TransportPair(lambda wake: make("tcp", wake))
    port = pair.receiver.transport._receiving.listener.port  # type: ignore[attr-defined]
    table = pair.receiver.transport._receiving.listener  # type: ignore[attr-defined]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
    eventually(lambda: len(table._newcomers) == 3)
    real, left = socket.socket.accept, [1]

    def accept(sock: socket.socket) -> Any:
        if sock is table.sock and left and left.pop():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(sock)

    monkeypatch.setattr(socket.socket, "accept", accept)
    newcomer = Endpoint(lambda wake: make("tcp", wake))
    newcomer.transport.connect(pair.handle)
    pair.admit(1, (0,))
    newcomer.transport.write(pair.handle, 1, (0,), pair.fill((0,)), 1)
    assert newcomer.written(1) is None
    strangers[0].settimeout(20)
    read_hello(strangers[0])
    assert strangers[0].recv(1) == b"", "it had waited longest"
    assert table.evicted == 1
    for sock in strangers:
        sock.close()
    newcomer.transport.close()
    pair.close()
