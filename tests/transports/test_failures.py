"""Faults inside a transport, injected one by one: each costs a connection, or at most the transport, and no more."""

from __future__ import annotations

import errno
import fcntl
import gc
import logging
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from embferry.memory.buffers import MultimodalDataBuffers, source_pieces
from embferry.protocol.errors import TransportError
from embferry.testing.pair import DEADLINE_S, LARGE, LAYOUT, SMALL, Endpoint, TransportPair, embedding, eventually
from embferry.transfer.guarded_transport import GuardedTransport
from embferry.transports.contract import Revoked, Transport, Window, Written
from embferry.transports.http import remote_sender, serving
from embferry.transports.http import send_link as http_link
from embferry.transports.leased import receiving_end, sending_end
from embferry.transports.net import listener, loop
from embferry.transports.registry import TRANSPORTS
from embferry.transports.shm import peer as shm_peer
from embferry.transports.shm import revocation_table
from embferry.transports.shm import transport as shm
from embferry.transports.tcp import receive_server
from embferry.transports.tcp import send_link as tcp_link

pytestmark = pytest.mark.integration

CALLBACKS = [
    pytest.param("tcp", receive_server.SenderConnection, "_on_hello", id="tcp receiver: hello"),
    pytest.param("tcp", receive_server.SenderConnection, "_on_head", id="tcp receiver: head"),
    pytest.param("tcp", receive_server.SenderConnection, "_on_ranges", id="tcp receiver: ranges"),
    pytest.param("tcp", receive_server.SenderConnection, "_receive_payload", id="tcp receiver: payload"),
    pytest.param("tcp", receive_server.SenderConnection, "_finish", id="tcp receiver: end of a write"),
    pytest.param("tcp", receive_server.SenderConnection, "_send_verdicts", id="tcp receiver: verdict"),
    pytest.param("tcp", receive_server.SenderConnection, "__init__", id="tcp receiver: accept"),
    pytest.param("tcp", tcp_link.SendLink, "_send", id="tcp sender: write"),
    pytest.param("tcp", tcp_link.SendLink, "_on_connected", id="tcp sender: connected"),
    pytest.param("tcp", tcp_link.SendLink, "_flush", id="tcp sender: send"),
    pytest.param("tcp", tcp_link.SendLink, "_receive_verdicts", id="tcp sender: receive"),
    pytest.param("tcp", tcp_link.SendLink, "_on_verdict", id="tcp sender: verdict"),
    pytest.param("http", serving.ServerConnection, "__init__", id="http sender: accept"),
    pytest.param("http", serving.ServerConnection, "_receive", id="http sender: receive"),
    pytest.param("http", serving.ServerConnection, "_on_bytes_sent", id="http sender: send"),
    pytest.param("http", serving.SenderServer, "_on_request", id="http sender: request"),
    pytest.param("http", serving.SenderServer, "_respond_to_fetch", id="http sender: fetch"),
    pytest.param("http", serving.SenderServer, "_respond_to_poll", id="http sender: poll"),
    pytest.param("http", serving.SenderServer, "_answer_pending", id="http sender: pending poll"),
    pytest.param("http", http_link.SendLink, "_announce", id="http sender: publish"),
    pytest.param("http", http_link.SendLink, "finish", id="http sender: outcome"),
    pytest.param("http", remote_sender.RemoteSender, "poll", id="http receiver: poll"),
    pytest.param("http", remote_sender.RemoteSender, "_take", id="http receiver: publications"),
    pytest.param("http", remote_sender.Fetch, "on_head", id="http receiver: head"),
    pytest.param("http", remote_sender.Fetch, "receive", id="http receiver: payload"),
    pytest.param("http", remote_sender.Fetch, "on_end", id="http receiver: end of a fetch"),
    pytest.param("shm", shm._Link, "_copy_locked", id="shm sender: copy"),
    pytest.param("shm", shm._Link, "_watch", id="shm sender: watch"),
    *(
        pytest.param(name, kind, method, id=f"{name} {what}", marks=pytest.mark.engines)
        for name in ("nixl", "mooncake")
        for kind, method, what in (
            (receiving_end.SenderConnection, "__init__", "receiver: accept"),
            (receiving_end.SenderConnection, "_on_hello", "receiver: hello"),
            (receiving_end.SenderConnection, "_on_message", "receiver: message"),
            (receiving_end.SenderConnection, "send_verdict", "receiver: verdict"),
            (sending_end.SendingEnd, "_on_connected", "sender: connected"),
            (sending_end.SendingEnd, "_on_message", "sender: message"),
            (sending_end.SendingEnd, "_on_over", "sender: end of a write"),
            (sending_end.SendingEnd, "_start_check", "sender: signs of life"),
        )
    ),
]


def make(name: str, wake: Callable[[], None]) -> Transport:
    """Makes a transport that gives a peer up soon."""
    if name in ("nixl", "mooncake"):
        return TRANSPORTS[name].load()(wake, connect_timeout_s=2.0)  # type: ignore[call-arg]
    return TRANSPORTS[name].load()(wake, stall_timeout_s=1.0)  # type: ignore[call-arg]


POLLING = (remote_sender.RemoteSender, remote_sender.Fetch, serving.ServerConnection, serving.SenderServer)
"""Callbacks that also run for the other receiver, which polls meanwhile."""


class Bug:
    """Replaces a method by one that raises, the first time only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: type[Exception]) -> None:
        self.raised = 0
        self._real, self._error = getattr(owner, name), error
        bug = self

        def call(*arguments: Any, **named: Any) -> Any:
            if not bug.raised:
                bug.raised += 1
                raise bug._error("a bug")
            return bug._real(*arguments, **named)

        monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize(("name", "owner", "method"), CALLBACKS)
def test_what_a_callback_raises_ends_its_connection_only(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    owner: Any,
    method: str,
    error: type[Exception],
) -> None:
    """The write ends; writes to another receiver and, once connected again, to the same one succeed."""
    pair, other = (TransportPair(lambda wake: make(name, wake)) for _ in range(2))
    sender = pair.sender
    sender.transport.connect(other.handle)
    other.receiver.transport.connect_to_sender(sender.transport.address)
    other.admit(1, (0,))
    sender.transport.write(other.handle, 1, (0,), other.fill((0,)), 1000)
    assert sender.written(1000) is None  # the bug hits the other link
    bug = Bug(monkeypatch, owner, method, error)
    reconnect(pair)
    pair.admit(1, (1, 2))
    pieces = pair.fill((1, 2))
    first = pair.write(1, (1, 2), pieces)
    eventually(lambda: bug.raised == 1)
    assert first is None or isinstance(first, TransportError)
    if first is not None:
        succeeds_again(pair, pieces)
    pair.expect(pieces)
    sender.transport.write(other.handle, 1, (0,), other.fill((0,)), 1001)
    if sender.written(1001) is not None:
        assert owner in POLLING, "the other link was harmed"
        assert other.receiver is not None
        connect(other)
    for end in (pair.sender, pair.receiver, other.sender, other.receiver):
        end.poll()  # raises if a transport has failed
    eventually(lambda: any(record.exc_info for record in caplog.records if record.levelno >= logging.ERROR))
    pair.close()
    other.close()


def reconnect(pair: TransportPair) -> None:
    """Makes the link to the receiver of ``pair`` anew."""
    pair.sender.transport.disconnect(pair.handle)
    connect(pair)


def connect(pair: TransportPair) -> None:
    pair.sender.transport.connect(pair.handle)
    pair.receiver.transport.connect_to_sender(pair.sender.transport.address)


def succeeds_again(pair: TransportPair, pieces: list[Any]) -> None:
    """Connects and writes until that succeeds, as a manager does."""
    errors: list[TransportError | None] = []
    while len(errors) < 5:
        connect(pair)
        errors.append(pair.write(1, (1, 2), pieces))
        if errors[-1] is None:
            return
    pytest.fail(f"no attempt succeeds: {errors}")


def remains() -> tuple[int, set[threading.Thread], int]:
    gc.collect()
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:embferry" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), set(threading.enumerate()), shared


def transports() -> Iterator[Any]:
    for name, spec in TRANSPORTS.items():
        yield pytest.param(name, marks=[pytest.mark.engines] * spec.needs_engine)


@pytest.mark.parametrize("name", list(transports()))
@pytest.mark.parametrize("fail", ["the loop", "a callback"])
def test_a_transport_whose_loop_fails_is_reported_once_and_leaves_nothing(name: str, fail: str) -> None:
    how = fail_loop if fail == "the loop" else fail_callback
    logging.disable()  # pytest keeps records, whose tracebacks hold the transports
    try:
        lose_both_ends(name, how)  # an engine makes some things once and for good
        before = remains()
        lose_both_ends(name, how)
    finally:
        logging.disable(logging.NOTSET)
    assert remains() == before


def lose_both_ends(name: str, fail: Callable[[loop.LoopThread], None]) -> None:
    """Makes the loops of a sender and of a receiver fail, with a write under way, and closes the transports."""
    region = MultimodalDataBuffers(SMALL, shared=True)
    receiver, sender = (GuardedTransport(make(name, lambda: None), lambda: None) for _ in range(2))
    handle = receiver.register(region)
    receiver.connect_to_sender(sender.address)
    sender.connect(handle)
    receiver.admit(Window(1, (0,)))
    source = embedding(LAYOUT, SMALL.block_size)
    sender.write(handle, 1, (0,), source_pieces(SMALL, source, 0, SMALL.block_size, (0,), 0), 1)
    for end in (sender, receiver):
        fail(end._transport._loop)  # type: ignore[attr-defined]
        eventually(partial(is_lost, end))
        assert end.lost is not None
        assert not end.lost.retryable
    receiver.revoke(1)
    assert receiver.poll() == [Revoked(1)]
    for end in (sender, receiver):
        end.close()
        assert end.poll() == []
    region.close()


def is_lost(end: GuardedTransport) -> bool:
    end.poll()
    return end.lost is not None


def fail_loop(thread: loop.LoopThread) -> None:
    def fail() -> None:
        raise RuntimeError("a bug in the loop")

    thread.call(lambda: None)  # starts it, if nothing has
    thread.loop._run_timers = fail  # type: ignore[method-assign]
    thread.loop.wake()
    thread._thread.join(DEADLINE_S)
    assert not thread._thread.is_alive()


def fail_callback(thread: loop.LoopThread) -> None:
    def fail() -> None:
        raise RuntimeError("a bug in a callback")

    thread.call(fail)


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
    eventually(lambda: len(table._greeting) == 3)
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
    assert strangers[0].recv(1) == b"", "it had waited longest"
    assert table.evicted == 1
    for sock in strangers:
        sock.close()
    newcomer.transport.close()
    pair.close()
