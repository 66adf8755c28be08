"""Peers of the ``nixl`` and ``mooncake`` transports that break the rules of the side channel."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.pair import SMALL, Endpoint, TransportPair, eventually
from embferry.transports.contract import Revoked
from embferry.transports.leased import messages as m
from embferry.transports.leased.leases import MAX_LEASES, LeaseTable
from embferry.transports.leased.mooncake import MooncakeTransport
from embferry.transports.leased.nixl import NixlTransport
from embferry.transports.leased.receiving_end import ReceivingEnd
from embferry.transports.leased.transport import LeasedTransport
from embferry.trust.greeting import Role
from tests.ports import free_port
from tests.transports.leased_peer import (
    TIMEOUT_S,
    ask,
    connected,
    decoded,
    frame,
    frames,
    greet,
    holder,
    receive,
    receiving,
)
from tests.trust import raw

pytestmark = [pytest.mark.integration, pytest.mark.engines]

Make = Callable[..., LeasedTransport[Any]]


@pytest.fixture(params=[NixlTransport, MooncakeTransport])
def make(request: pytest.FixtureRequest) -> Make:
    kind: Make = request.param
    return kind


def patient(make: Make) -> Make:
    """The transport, with a Mooncake receiver that cuts off no sender that is alive."""
    return lambda wake: make(wake, **({"revoke_grace_s": 60.0} if make is MooncakeTransport else {}))


@pytest.fixture
def pair(make: Make) -> Iterator[TransportPair]:
    pair = TransportPair(patient(make))
    yield pair
    pair.close()


def table(pair: TransportPair) -> LeaseTable:
    end: ReceivingEnd = receiving(pair)
    return end.table


# Senders that misbehave


BAD_GREETINGS = [
    frame(m.Hello(bytes(16), "elsewhere")),
    frame(m.Broken()),
    frame(ask(1)),
    frame(b"\xc1"),
    frame(b"x" * 300),
    b"\x00\x00\x00\x00",
    b"\xff\xff\xff\xff",
    b"GET / HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("data", BAD_GREETINGS)
def test_a_stranger_is_hung_up_on(pair: TransportPair, data: bytes) -> None:
    with connected(pair) as sock:
        sock.sendall(data)
        assert receive(sock) is None
    pair.admit(1, (0,))
    assert pair.write(1, (0,), pair.fill((0,))) is None


BAD_MESSAGES = [
    m.Hello(bytes(16), "again"),
    m.Welcome(b"", 0),
    m.Verdict(0, True),
    m.Done(0),
    m.Failed(0),
    m.Acknowledged(0, True),
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
    with connected(pair) as sock:
        greet(pair, sock)
        sock.sendall(frame(message, 1))
        assert receive(sock) is None
        sock.sendall(frame(ask(5), 2))  # which is not read any more
        assert receive(sock) is None
    assert pair.write(1, (0,), pair.fill((0,))) is None
    assert 5 not in [lease.serial for lease in table(pair).out()]


@pytest.mark.parametrize("again", [[ask(5)], [ask(serial) for serial in range(6, 6 + MAX_LEASES)]])
def test_a_sender_that_asks_twice_or_too_often_is_hung_up_on(pair: TransportPair, again: list[m.Ask]) -> None:
    pair.admit(1, (0,))
    with holder(pair, 5, epoch=1) as sock:
        sock.sendall(frames(again, 2))
        while (answer := receive(sock)) is not None:
            assert isinstance(answer, m.Verdict)


def test_the_lease_of_a_sender_that_was_hung_up_on_lasts_until_it_hangs_up_too(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pair.admit(2, (1,))
    with holder(pair, 5, epoch=1) as sock:
        sock.sendall(frame(m.Done(6), 2))
        assert receive(sock) is None
        pair.receiver.transport.revoke(1)
        for seed in range(3):  # while the receiver is busy with others, and has nowhere to send "stop" to
            assert pair.write(2, (1,), pair.fill((1,), seed)) is None
        assert not any(sender.ending for sender in receiving(pair).listener.connections)
        pair.receiver.poll()
        assert Revoked(1) not in pair.receiver.events
    pair.receiver.revoked(1)


NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, SMALL.region_bytes), st.integers(0, (1 << 64) - 1))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asks=st.lists(st.tuples(NUMBERS, NUMBERS, st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=3))),
    ends=st.lists(st.one_of(NUMBERS.map(m.Done), NUMBERS.map(m.Failed)), max_size=2),
    junk=st.binary(max_size=60),
    flip=st.one_of(st.none(), st.integers(0, 200)),
)
def test_fuzzed_messages_harm_only_their_sender(
    pair: TransportPair,
    asks: list[tuple[int, int, list[tuple[int, int]]]],
    ends: list[m.Message],
    junk: bytes,
    flip: int | None,
) -> None:
    asked = [ask(serial, epoch, *ranges) for serial, epoch, ranges in asks]
    data = bytearray(frames([*asked, *ends], 1) + junk)
    if flip is not None and data:
        data[flip % len(data)] ^= 0xFF
    pair.receiver.transport.revoke(1)
    pair.receiver.until(lambda: not table(pair).out())
    pair.admit(1, (0,))
    with connected(pair) as sock:
        greet(pair, sock)
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        while (answer := receive(sock)) is not None:
            assert isinstance(answer, m.Verdict | m.Welcome | m.Stop | m.Acknowledged)
    pair.receiver.poll()  # raises when the receiver's thread has died
    pair.expect()


# Receivers that misbehave


@pytest.fixture
def impostor(pair: TransportPair) -> Iterator[tuple[socket.socket, bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)
        yield listener, handle_to(pair, port=listener.getsockname()[1])


def handle_to(pair: TransportPair, **changes: Any) -> bytes:
    """The handle of the pair, with changes."""
    return msgspec.msgpack.encode(msgspec.structs.replace(decoded(pair), **changes))


@pytest.mark.parametrize(
    "reply",
    [
        frame(m.Verdict(9, True)),
        frame(m.Verdict(0, True)),  # before it was asked
        frame(m.Acknowledged(0, True)),
        frame(m.Ask(1, 1, bytes(16))),
        frame(b"\xc1"),
        b"\xff\xff\xff\xff",
        b"",
    ],
)
def test_a_receiver_that_breaks_the_format_is_a_lost_link(
    impostor: tuple[socket.socket, bytes], pair: TransportPair, reply: bytes
) -> None:
    listener, handle = impostor
    pair.sender.transport.connect(handle)
    pair.sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    connection = raw.greet(listener.accept()[0], pair.sender.transport.channel, Role.ACCEPTOR)  # type: ignore[attr-defined]
    with connection:
        assert isinstance(receive(connection), m.Hello)
        connection.sendall(reply)
        connection.shutdown(socket.SHUT_WR)
        error = pair.sender.written(1)
        assert error is not None
        assert error.retryable
        assert pair.sender.lost().handle == handle


def test_a_receiver_that_never_answers_is_given_up(
    impostor: tuple[socket.socket, bytes], pair: TransportPair, make: Make
) -> None:
    _, handle = impostor
    sender = Endpoint(lambda wake: make(wake, connect_timeout_s=0.1))
    sender.transport.connect(handle)
    sender.transport.write(handle, 1, (0,), pair.fill((0,)), 1)
    error = sender.written(1)
    assert error is not None
    assert error.retryable
    assert "within 0.1 s" in str(error)
    sender.lost()
    sender.transport.close()


def test_a_refused_connection_is_an_error_or_a_lost_link(pair: TransportPair) -> None:
    refused: TransportError | None = None
    try:
        pair.sender.transport.connect(handle_to(pair, port=free_port()))
    except TransportError as error:  # where the kernel knows at once
        refused = error
    if refused is None:
        refused = pair.sender.lost().error
    assert refused.retryable


@pytest.mark.parametrize("host", ["not-an-address", "", "127.0.0.1:80", "::1%lo\x00", "0.0.0.0", "::", "224.0.0.1"])
def test_a_handle_with_a_host_that_cannot_be_is_refused(pair: TransportPair, host: str) -> None:
    with pytest.raises(TransportError) as caught:
        pair.sender.transport.connect(handle_to(pair, host=host))
    assert not caught.value.retryable


@pytest.mark.parametrize("arguments", [{"host": "0.0.0.0"}, {"host": "localhost"}, {"advertise": "a.host.name"}])
def test_an_address_that_peers_cannot_use_is_refused(make: Make, arguments: dict[str, str]) -> None:
    buffers = MultimodalDataBuffers(SMALL, shared=True)
    transport = make(**arguments)
    with pytest.raises(LocalProtocolError):
        transport.register(buffers)
    transport.close()
    buffers.close()


# The limit of a sender


def test_more_writes_than_may_be_asked_for_at_a_time_all_end(pair: TransportPair) -> None:
    pair.admit(1, (0,))
    pieces = pair.fill((0,))
    tickets = [pair.start(1, (0,), pieces) for _ in range(2 * MAX_LEASES)]
    assert [pair.sender.written(ticket) for ticket in tickets] == [None] * len(tickets)
    eventually(lambda: table(pair).out() == ())
    pair.expect(pieces)
