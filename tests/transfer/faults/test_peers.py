"""Peers that lie, flood or vanish cost at most their own transfer."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import pytest

from embferry import ReceiveManager, SendManager, wait
from embferry.protocol.errors import CapacityError, EmbeddingTransferError, LocalProtocolError, PeerGone
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import MAX_TOKENS, VERSION, Chunk, Frame, Grant, Offer, Open, Written, decode, encode
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from embferry.transfer.control.contract import Received
from embferry.transfer.control.sockets import SocketControl
from embferry.transports.http.transport import HttpTransport
from embferry.transports.in_memory.transport import InMemoryTransport
from embferry.transports.net.loop import Loop
from embferry.transports.tcp.transport import TcpTransport

from ..conftest import LAYOUT, SECONDS, Pair, advance_clock, embedding, same
from .scene import make_scene, nothing_left_open

M = TypeVar("M")
SESSION = 99


class Rogue:
    """A control plane that says what a test wants it to say."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.control = SocketControl(self.loop, "127.0.0.1")
        self.peer: Any = None
        self.frame: Frame | None = None
        self._frames: list[Received] = []

    def hears(self, kind: type[M]) -> M:
        """Waits for a message of a kind, and takes note of its sender."""
        deadline = time.monotonic() + SECONDS
        while True:
            while self._frames:
                received = self._frames.pop(0)
                frame = decode(received.data)
                if isinstance(frame.body, kind):
                    self.peer, self.frame = received.peer, frame
                    return frame.body
            assert time.monotonic() < deadline
            self.loop.run_once(0.1)
            self._frames += [event for event in self.control.poll() if isinstance(event, Received)]

    def says(self, body: Any, peer: Any = None) -> None:
        target = self.frame.source if self.frame else 0
        self.say_raw(encode(Frame(VERSION, SESSION, target, body)), peer)

    def say_raw(self, data: bytes, peer: Any = None) -> None:
        self.control.send(peer or self.peer, data)
        self.loop.run_once(0)

    def close(self) -> None:
        self.control.close()
        self.loop.close()


@pytest.fixture
def rogue() -> Iterator[Rogue]:
    rogue = Rogue()
    yield rogue
    rogue.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    settings = TransferSettings(parked_requests=8, parked_bytes=20_000)
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()], settings=settings)
    pair = Pair(receiving, SendManager(LAYOUT, [InMemoryTransport()], settings=settings), InMemoryTransport)
    yield pair
    for manager in (pair.sending, *pair.extra, pair.receiving):
        assert manager.fault is None
        manager.close()


def still_serves(pair: Pair) -> bool:
    """Returns whether a transfer arrives."""
    rows = embedding(40)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    return same(receiver.arrays(), rows)


@pytest.mark.parametrize("bound", [1 << 30, 1 << 62], ids=["beyond the bound", "beyond the memory"])
def test_a_sender_that_lies_about_its_length_ends_one_transfer(rogue: Rogue, bound: int) -> None:
    settings = TransferSettings(max_embedding_bytes=bound)
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()], settings=settings)
    pair = Pair(receiving, SendManager(LAYOUT, [InMemoryTransport()]), InMemoryTransport)
    receiver = receiving.open(7, rogue.control.endpoint)
    receiver.init()
    opened = rogue.hears(Open)
    rogue.says(Offer(7, opened.generation, 1, "memory", MAX_TOKENS, b"digest"))
    if bound > 1 << 50:
        grant = rogue.hears(Grant)
        rogue.says(Written(7, grant.epoch, (Chunk(grant.sent_tokens, 16, b"12345678"),)))
    with pytest.raises(CapacityError):
        wait(receiver, SECONDS)
    assert still_serves(pair)
    pair.sending.close()
    pair.receiving.close()


def test_requests_for_unknown_rooms_are_kept_within_bounds(pair: Pair, rogue: Rogue) -> None:
    geometry = Geometry(LAYOUT, 8, 16)
    for room in range(200):
        body = Open(room, 1, (1, 1), geometry, "x" * 200, pair.receiving.addresses, 0)
        rogue.says(body, pair.sending.endpoint)
    parked = pair.sending.parked
    deadline = time.monotonic() + SECONDS
    while 199 not in parked._by_room:
        assert time.monotonic() < deadline
        rogue.loop.run_once(0.01)
    assert len(parked) <= 8
    assert parked.nbytes <= 20_000
    assert still_serves(pair)
    advance_clock(pair.sending, pair.sending.settings.bootstrap_timeout)
    while len(parked):
        assert time.monotonic() < deadline
        pair.sending.wake()


def test_a_request_with_endless_fields_is_dropped(pair: Pair, rogue: Rogue) -> None:
    geometry = [[[["a", "b", 1]] * 60_000], 1, 1]
    data = [VERSION, 5, 0, ["open", 7, 1, [1, 1], geometry, "e", [["tcp", b"h"]], 0, True]]
    rogue.say_raw(msgspec.msgpack.encode(data), pair.sending.endpoint)
    deadline = time.monotonic() + SECONDS
    while not pair.sending.rejected_messages:
        assert time.monotonic() < deadline
        rogue.loop.run_once(0.01)
    assert still_serves(pair)


@pytest.mark.parametrize(
    "endpoint",
    ["tcp://a b:55", "tcp://*:5555", "tcp://no;such:5555", "tcp://h:²", "tcp://h:0", "tcp://h:65536", "tcp://h",
     "tcp://:5", "ipc://x", "", "tcp://\ud800:5", "tcp://[::1", "tcp://[1.2.3.4]:5", "tcp://h\n:5", 7, None, b"tcp://h:5"],
    ids=ascii,
)  # fmt: skip
def test_an_endpoint_that_cannot_be_one_is_refused_at_the_call(pair: Pair, endpoint: Any) -> None:
    with pytest.raises(LocalProtocolError, match="control endpoint"):
        pair.receiving.open(7, endpoint)
    receiver = pair.receiver()
    receiver.init()
    with pytest.raises(LocalProtocolError, match="control endpoint"):
        receiver.redirect(endpoint)


def test_a_name_without_an_address_fails_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    receiver = pair.receiving.open(7, "tcp://no-such-host.invalid:5555")
    receiver.init()
    with pytest.raises(PeerGone, match="has no address"):
        wait(receiver, SECONDS)
    assert still_serves(pair)


def test_a_transport_whose_thread_fails_is_closed_and_its_transfers_go_on() -> None:
    with nothing_left_open():
        _lose_a_transport()


def _lose_a_transport() -> None:
    scene = make_scene()
    scene.begin_others()
    carrier = scene.carriers["receiving"]
    assert isinstance(carrier, TcpTransport)
    assert carrier._receiving is not None
    listener = carrier._receiving.listener.sock
    carrier._outbox.fail(RuntimeError("a bug in the thread of a transport"))
    scene.finish_others()
    assert listener.fileno() == -1
    assert scene.receiving.fault is None
    assert [address.name for address in scene.receiving.addresses] == ["shm"]
    for manager in scene.managers:
        manager.close()


def test_a_manager_all_of_whose_transports_have_failed_says_so(pair: Pair) -> None:
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()])
    receiver = receiving.open(7, pair.sending.endpoint)
    receiver.init()
    (transport,) = receiving.transports.values()
    transport._transport._outbox.fail(RuntimeError("a bug in the thread of a transport"))  # type: ignore[attr-defined]
    receiving.wake()
    with pytest.raises(EmbeddingTransferError, match="a bug in the thread"):
        wait(receiver, SECONDS)
    assert receiving.fault is not None
    with pytest.raises(EmbeddingTransferError, match="a bug in the thread"):
        receiving.open(8, pair.sending.endpoint)
    receiving.close()


def test_the_host_of_every_connection_is_watched() -> None:
    """A dead host's connections are gone within a minute, on both ends of the control plane and of the transports."""
    for transport in (TcpTransport, HttpTransport):
        receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [transport()])
        pair = Pair(receiving, SendManager(LAYOUT, [transport()]), transport)
        assert still_serves(pair)
        found = [sock for fd in os.listdir("/proc/self/fd") if (sock := _connected(int(fd))) is not None]
        assert len(found) >= 4  # both ends of a control connection and of a data connection
        for sock in found:
            with sock:
                assert _seconds_until_noticed(sock) <= 60, sock
        pair.sending.close()
        pair.receiving.close()


def _connected(fd: int) -> socket.socket | None:
    """Returns a copy of a connected TCP socket of this process, or None if that is something else."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        return None
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            return None
        sock.getpeername()
        return sock.dup()
    except OSError:
        return None
    finally:
        sock.detach()


def _seconds_until_noticed(sock: socket.socket) -> float:
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        return float("inf")
    idle, interval, count, unsent_ms = (
        sock.getsockopt(socket.IPPROTO_TCP, option)
        for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
    )
    return max(idle + interval * count, unsent_ms / 1000 or float("inf"))


@pytest.mark.parametrize("first", ["sending", "receiving"])
def test_closing_in_the_middle_of_transfers_leaves_nothing_open(first: str) -> None:
    with nothing_left_open():
        _close_at_once(first)


def _close_at_once(first: str) -> None:
    scene = make_scene()
    scene.begin_others()
    getattr(scene, first).close()
    for other in scene.others:
        with pytest.raises(EmbeddingTransferError, match="shutting down"):
            wait(other.receiver, SECONDS)
    for manager in scene.managers:
        manager.close()
    assert all(other.sender.poll() is KVPoll.Failed and other.sender.source_released for other in scene.others)
