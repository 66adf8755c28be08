"""What peers may say to the ``nixl`` transport, and what becomes of those that say something else."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.pair import SMALL, Endpoint, TransportPair, eventually
from embferry.transports.leased.nixl import NixlTransport
from embferry.transports.leased.nixl import messages as m
from embferry.transports.leased.nixl.server import Server
from embferry.transports.leased.nixl.transport import NixlHandle, boot_id
from embferry.transports.windows import as_ranges

pytestmark = [pytest.mark.integration, pytest.mark.engines]

TIMEOUT_S = 20.0


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    pair = TransportPair(NixlTransport)
    yield pair
    pair.close()


def server(pair: TransportPair) -> Server:
    transport = pair.receiver.transport
    assert isinstance(transport, NixlTransport)
    assert transport._receiving is not None
    return transport._receiving


# Senders that misbehave


def dial(pair: TransportPair) -> socket.socket:
    handle = target(pair)
    sock = socket.create_connection((handle.host, handle.port))
    sock.settimeout(TIMEOUT_S)
    return sock


def target(pair: TransportPair) -> NixlHandle:
    return msgspec.msgpack.decode(pair.handle, type=NixlHandle)


def frame(message: m.Message | bytes) -> bytes:
    data = message if isinstance(message, bytes) else m.encode(message)
    return m.LENGTH.pack(len(data)) + data


def receive(sock: socket.socket) -> m.Message | None:
    """None: the peer hung up."""
    data = b""
    wanted = m.LENGTH.size
    while len(data) < wanted:
        part = sock.recv(wanted - len(data))
        if not part:
            return None
        data += part
        if len(data) == m.LENGTH.size:
            wanted += m.LENGTH.unpack(data)[0]
    return m.decode(data[m.LENGTH.size :])


def greet(pair: TransportPair, sock: socket.socket) -> None:
    sock.sendall(frame(m.Hello(target(pair).token, boot_id())))
    assert isinstance(receive(sock), m.Welcome)


BAD_GREETINGS = [
    frame(m.Hello(bytes(16), "elsewhere")),
    frame(m.Broken()),
    frame(b"\xc1"),
    frame(b"x" * 300),
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"GET / HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("data", BAD_GREETINGS)
def test_a_stranger_is_shown_out(pair: TransportPair, data: bytes) -> None:
    with dial(pair) as sock:
        sock.sendall(data)
        assert hung_up(sock)
    pair.admit(1, (0,))
    assert pair.write(1, (0,), pair.fill((0,))) is None


def hung_up(sock: socket.socket) -> bool:
    try:
        return receive(sock) is None
    except ConnectionResetError:
        return True


BAD_MESSAGES = [
    m.Hello(bytes(16), "again"),
    m.Welcome(b"", 0),
    m.Verdict(0, True),
    m.Done(0),
    m.Stop(0),
    m.Ask(0, 1, b"x" * 17),
    msgspec.msgpack.encode(["ask", 0, 1]),
    msgspec.msgpack.encode(["ask", -1, 1, bytes(16)]),
    msgspec.msgpack.encode(["ask", 0, 1, bytes(15)]),
    msgspec.msgpack.encode(["done", 0, 0]),
    b"\x91" * 500,
]


@pytest.mark.parametrize("message", BAD_MESSAGES)
def test_a_sender_that_breaks_the_format_is_hung_up_on(pair: TransportPair, message: m.Message | bytes) -> None:
    pair.admit(1, (0,))
    with dial(pair) as sock:
        greet(pair, sock)
        sock.sendall(frame(message))
        assert receive(sock) is None
        sock.sendall(frame(m.Ask(5, 1, m.pack_ranges(as_ranges([(0, 1)])))))  # heard by nobody
        assert receive(sock) is None
    assert pair.write(1, (0,), pair.fill((0,))) is None


def test_a_lease_of_a_sender_that_was_hung_up_on_lasts_until_it_hangs_up_too(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    with dial(pair) as sock:
        greet(pair, sock)
        sock.sendall(frame(m.Ask(5, 1, m.pack_ranges(as_ranges([(0, 1)])))))
        assert receive(sock) == m.Verdict(5, True)
        sock.sendall(frame(m.Done(6)))
        assert receive(sock) is None
        pair.receiver.transport.revoke(1)
        assert pair.receiver.transport.poll() == []
    pair.receiver.revoked(1)


def test_an_ask_waits_for_a_lease_of_closed_blocks(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    with dial(pair) as sock:
        greet(pair, sock)
        sock.sendall(frame(m.Ask(5, 1, m.pack_ranges(as_ranges([(0, 1)])))))
        assert receive(sock) == m.Verdict(5, True)
        pair.receiver.transport.close_blocks(1, (0,))
        assert receive(sock) == m.Stop(5)
        pair.admit(2, (0,))
        pieces = pair.fill((0,))
        ticket = pair.start(2, (0,), pieces)
        eventually(lambda: bool(server(pair).gate._waiting))
        assert pair.sender.transport.poll() == []
        sock.sendall(frame(m.Done(5)))
        assert pair.sender.written(ticket) is None
    pair.expect(pieces)


NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, SMALL.region_bytes), st.integers(0, (1 << 64) - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asks=st.lists(st.tuples(NUMBERS, NUMBERS, st.lists(st.tuples(NUMBERS, NUMBERS), max_size=3)), max_size=3),
    junk=st.binary(max_size=60),
    flip=st.one_of(st.none(), st.integers(0, 200)),
)
def test_fuzzed_messages_harm_nobody(
    pair: TransportPair, asks: list[tuple[int, int, list[tuple[int, int]]]], junk: bytes, flip: int | None
) -> None:
    data = bytearray()
    for serial, epoch, ranges in asks:
        data += frame(m.Ask(serial, epoch, m.pack_ranges(as_ranges(ranges))))
    data += junk
    if flip is not None and data:
        data[flip % len(data)] ^= 0xFF
    pair.receiver.transport.revoke(1)
    pair.receiver.until(lambda: not server(pair).gate.out())
    pair.admit(1, (0,))
    with dial(pair) as sock:
        greet(pair, sock)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while (answer := receive(sock)) is not None:
            assert isinstance(answer, m.Verdict | m.Stop)
    eventually(lambda: not server(pair).gate.out())
    pair.receiver.poll()  # raises when the receiver's thread has died
    pair.expect()


# Receivers that misbehave


@pytest.fixture
def impostor() -> Iterator[tuple[socket.socket, bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield listener, msgspec.msgpack.encode(NixlHandle("127.0.0.1", listener.getsockname()[1], bytes(16)))


@pytest.mark.parametrize(
    "reply",
    [
        frame(m.Welcome(b"not what an agent says", 0)),
        frame(m.Verdict(9, True)),
        frame(m.Ask(1, 1, bytes(16))),
        frame(b"\xc1"),
        b"\xff\xff\xff\xff",
        b"",
    ],
)
def test_a_receiver_that_talks_nonsense_is_a_lost_link(
    impostor: tuple[socket.socket, bytes], pair: TransportPair, reply: bytes
) -> None:
    listener, handle = impostor
    sender = Endpoint(NixlTransport)
    sender.transport.connect(handle)
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    connection, _ = listener.accept()
    with connection:
        assert isinstance(receive(connection), m.Hello)
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        assert sender.written(1) is not None
        assert sender.lost().handle == handle
    sender.transport.close()


def test_a_receiver_that_never_answers_is_given_up(impostor: tuple[socket.socket, bytes], pair: TransportPair) -> None:
    _, handle = impostor
    sender = Endpoint(lambda wake: NixlTransport(wake, connect_timeout_s=0.1))
    sender.transport.connect(handle)
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    error = sender.written(1)
    assert error is not None
    assert error.retryable
    assert re.search("within 0.1 s", str(error))
    sender.lost()
    sender.transport.close()


def test_a_refused_connection_is_an_error_or_a_lost_link(pair: TransportPair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    handle = msgspec.msgpack.encode(NixlHandle("127.0.0.1", port, bytes(16)))
    sender = Endpoint(NixlTransport)
    refused: TransportError | None = None
    try:
        sender.transport.connect(handle)
    except TransportError as error:  # where the kernel knows at once
        refused = error
    if refused is None:
        refused = sender.lost().error
    assert refused.retryable
    sender.transport.close()


@pytest.mark.parametrize("host", ["not-an-address", "", "127.0.0.1:80", "::1%lo\x00", "0.0.0.0", "::", "224.0.0.1"])
def test_a_handle_with_a_strange_host_is_refused(pair: TransportPair, host: str) -> None:
    with pytest.raises(TransportError) as caught:
        pair.sender.transport.connect(msgspec.msgpack.encode(NixlHandle(host, 80, bytes(16))))
    assert not caught.value.retryable


@pytest.mark.parametrize("arguments", [{"host": "0.0.0.0"}, {"host": "localhost"}, {"advertise": "a.host.name"}])
def test_an_address_peers_cannot_use_is_refused(arguments: dict[str, str]) -> None:
    buffers = MultimodalDataBuffers(SMALL, shared=False)
    transport = NixlTransport(**arguments)  # type: ignore[arg-type]  # only strings are passed here
    with pytest.raises(LocalProtocolError):
        transport.register(buffers)
    transport.close()
    buffers.close()
