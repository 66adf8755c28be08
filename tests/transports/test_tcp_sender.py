"""The sender of the tcp transport against faulty receivers, and the addresses that both ends accept."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import msgspec
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.pair import SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import Piece
from embferry.transports.tcp import TcpTransport, framing
from embferry.transports.tcp.send_link import MAX_OVERTAKES
from embferry.transports.tcp.transport import TcpHandle
from embferry.transports.windows import RANGE_BYTES
from embferry.trust import Trust
from embferry.trust.greeting import Channel, Role
from tests.ports import free_port
from tests.trust.raw import greet

pytestmark = pytest.mark.integration

TIMEOUT_S = 20.0


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    pair = TransportPair(TcpTransport)
    yield pair
    pair.close()


@pytest.fixture
def raw_receiver() -> Iterator[tuple[socket.socket, bytes]]:
    """A listener whose responses the test makes, and its handle."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield listener, msgspec.msgpack.encode(TcpHandle("127.0.0.1", listener.getsockname()[1], bytes(16)))


@pytest.mark.parametrize(
    "reply",
    [
        b"nonsense that is long enough",
        framing.verdict_frame(99, 0),
        framing.verdict_frame(1, 7),
        framing.VERDICT.pack(b"EMBF", framing.VERSION, 3, 1, 1, 0),
        framing.verdict_frame(1, 0)[:-1],
        b"",
    ],
)
def test_a_malformed_verdict_is_a_lost_link(
    raw_receiver: tuple[socket.socket, bytes], pair: TransportPair, reply: bytes
) -> None:
    listener, handle = raw_receiver
    sender = Endpoint(TcpTransport)
    sender.transport.connect(handle)
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    connection = greet(listener.accept()[0], Channel.TCP, Role.ACCEPTOR)
    with connection:
        connection.recv(1)
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        error = sender.written(1)
        assert error is not None
        assert error.retryable
        assert sender.lost().handle == handle
    sender.transport.close()


def test_a_lost_link_can_be_connected_again(raw_receiver: tuple[socket.socket, bytes], pair: TransportPair) -> None:
    listener, handle = raw_receiver
    sender = Endpoint(TcpTransport)
    sender.transport.connect(handle)
    listener.accept()[0].close()
    sender.lost()
    sender.transport.connect(handle)
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    connection = greet(listener.accept()[0], Channel.TCP, Role.ACCEPTOR)
    with connection:
        connection.sendall(framing.verdict_frame(1, framing.WRITTEN))
        assert sender.written(1) is None
    sender.transport.close()


def test_a_refused_connection_is_an_error_or_a_lost_link(pair: TransportPair) -> None:
    handle = msgspec.msgpack.encode(TcpHandle("127.0.0.1", free_port(), bytes(16)))
    sender = Endpoint(TcpTransport)
    refused: TransportError | None = None
    try:
        sender.transport.connect(handle)
    except TransportError as error:  # if the kernel knows at once
        refused = error
    if refused is None:
        refused = sender.lost().error
    assert refused.retryable
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    unsent = sender.written(1)
    assert unsent is not None
    assert unsent.retryable
    sender.transport.close()


def test_a_receiver_that_never_accepts_is_a_lost_link(pair: TransportPair) -> None:
    """The listener's backlog is full, so the kernel drops further connections."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        handle = msgspec.msgpack.encode(TcpHandle("127.0.0.1", port, bytes(16)))
        sender = Endpoint(lambda wake: TcpTransport(wake, connect_timeout_s=0.1))
        sender.transport.connect(handle)
        sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
        error = sender.written(1)
        assert error is not None
        assert re.search("within 0.1 s", str(error))
        sender.lost()
        sender.transport.close()
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("settings", [{"host": "0.0.0.0"}, {"host": "localhost"}, {"advertise": "a.host.name"}])
def test_an_address_that_peers_cannot_use_is_refused(settings: dict[str, str]) -> None:
    buffers = MultimodalDataBuffers(SMALL, shared=False)
    transport = TcpTransport(**settings)  # type: ignore[arg-type]  # only strings are passed here
    with pytest.raises(LocalProtocolError):
        transport.register(buffers)
    transport.close()
    buffers.close()


def test_a_wildcard_listener_advertises_another_address() -> None:
    other = TransportPair(
        lambda wake: TcpTransport(wake, host="0.0.0.0", advertise="127.0.0.1", trust=Trust(insecure=True))
    )
    other.admit(1, (0,))
    other.expect(other.lands(1, (0,)))
    other.close()


def test_a_port_in_use_is_a_transport_error(pair: TransportPair) -> None:
    port = msgspec.msgpack.decode(pair.handle, type=TcpHandle).port
    buffers, transport = MultimodalDataBuffers(SMALL, shared=False), TcpTransport(port=port)
    with pytest.raises(TransportError, match="listen"):
        transport.register(buffers)
    transport.close()
    buffers.close()


@pytest.mark.parametrize("host", ["not-an-address", "", "127.0.0.1:80", "::1%lo\x00", "0.0.0.0", "::", "224.0.0.1"])
def test_a_handle_with_an_unusable_host_is_refused(pair: TransportPair, host: str) -> None:
    handle = msgspec.msgpack.encode(TcpHandle(host, 80, bytes(16)))
    with pytest.raises(TransportError) as caught:
        pair.sender.transport.connect(handle)
    assert not caught.value.retryable


@pytest.mark.parametrize("size", [64, 1 << 20], ids=["64 bytes", "1 MiB"])
def test_a_limited_number_of_small_frames_overtakes_waiting_large_ones(
    raw_receiver: tuple[socket.socket, bytes], size: int
) -> None:
    listener, handle = raw_receiver
    sender = Endpoint(TcpTransport)
    sender.transport.connect(handle)
    connection = greet(listener.accept()[0], Channel.TCP, Role.ACCEPTOR)
    large, small = bytes(16 << 20), bytes(size)
    total = 0
    for ticket in range(1, 30):  # the receiver reads nothing yet, so the first one stays under way
        payload = large if ticket <= 3 else small
        total += framing.HEAD.size + RANGE_BYTES + len(payload)
        sender.transport.write(handle, 1, (0,), [Piece(memoryview(payload), 0)], ticket)
        if ticket == 1:
            connection.recv(framing.HELLO.size, socket.MSG_WAITALL)
            connection.recv(1, socket.MSG_PEEK)
    (link,) = sender.transport._links.values()
    eventually(lambda: len(link._outgoing) == 29)
    order = []
    with connection:
        while total:
            head = connection.recv(framing.HEAD.size, socket.MSG_WAITALL)
            *_, ticket, ranges, _, payload_bytes = framing.HEAD.unpack(head)
            order.append(ticket)
            rest = ranges * RANGE_BYTES + payload_bytes
            total -= len(head) + rest
            while rest:
                rest -= len(connection.recv(min(rest, 1 << 20)))
    sender.transport.close()
    overtaking = list(range(4, 4 + MAX_OVERTAKES))
    assert order == [1, *overtaking, 2, 3, *range(4 + MAX_OVERTAKES, 30)]
