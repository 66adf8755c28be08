"""Strangers at the real ports of the control plane, the tcp transport and a side channel: nothing of them is taken."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import Field, Geometry, Layout, ReceiveManager, SendManager, TcpTransport, as_fields, wait
from embferry.protocol.errors import LocalProtocolError, WrongKey
from embferry.testing.pair import Endpoint, TransportPair, eventually
from embferry.transports.net.listener import Listener, ListenLimits
from embferry.transports.tcp.transport import TcpHandle
from embferry.trust import ClusterKeys, Key, Trust
from embferry.trust.greeting import HELLO, PROOF_BYTES, PROOFS_BYTES, REFUSED, Channel, Greeting, Role
from embferry.trust.keys import write_file
from tests.trust.greetings import CLUSTER, FOREIGN, KEYLESS, fit
from tests.trust.raw import hello, read_hello

pytestmark = pytest.mark.integration

SECONDS = 60.0
LAYOUT = Layout((Field("input_embeddings", "float32", 64),))


@dataclass
class Port:
    """A port with a key.

    Attributes:
        opened: Connections that have introduced themselves now.
    """

    channel: Channel
    listener: Listener[Any]
    opened: Callable[[], int]

    def connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.listener.port), SECONDS)
        sock.settimeout(SECONDS)
        return sock


def _control(limits: ListenLimits) -> Iterator[Port]:
    manager = SendManager(LAYOUT, [TcpTransport(trust=CLUSTER)], trust=CLUSTER)
    listener = manager._runtime.control._acceptor.listener  # type: ignore[attr-defined]
    listener._hellos._seconds = limits.hello_timeout
    yield Port(Channel.CONTROL, listener, lambda: manager._runtime.control.connections)  # type: ignore[attr-defined]
    assert manager._runtime.control.bad_frames == 0  # type: ignore[attr-defined]
    manager.close()


def _transport(channel: Channel, make: Callable[..., Any], limits: ListenLimits) -> Iterator[Port]:
    pair = TransportPair(lambda wake: make(wake, trust=CLUSTER, limits=limits))
    listener = pair.receiver.transport._receiving.listener  # type: ignore[attr-defined]
    eventually(lambda: len(listener) == 1)  # the sender of the pair, which has the key
    yield Port(channel, listener, lambda: len(listener) - 1)
    pair.close()


@pytest.fixture(params=["control", "tcp", pytest.param("nixl", marks=pytest.mark.engines)])
def port(request: pytest.FixtureRequest) -> Iterator[Port]:
    limits = ListenLimits(hello_timeout=getattr(request.node.function, "hello_timeout", 30.0))
    if request.param == "control":
        yield from _control(limits)
    elif request.param == "tcp":
        yield from _transport(Channel.TCP, TcpTransport, limits)
    else:
        from embferry.transports.leased.nixl import NixlTransport

        yield from _transport(Channel.NIXL, NixlTransport, limits)


def rest(sock: socket.socket) -> bytes:
    """Returns everything that the other end still sends; returns when it hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            received += part
    return received


def say(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it has hung up already
        sock.sendall(data)


FRAMES = b"\0\0\0\1\0\0\0\0x" * 100
"""Sent by a stranger after its greeting, in the hope that something parses it."""


def test_a_stranger_without_a_key_is_hung_up_on(port: Port) -> None:
    with port.connect() as sock:
        say(sock, hello(port.channel))
        assert len(read_hello(sock)) == HELLO.size
        say(sock, FRAMES)
        assert rest(sock) == b""
    assert port.opened() == 0


def test_a_stranger_with_another_key_is_refused(port: Port) -> None:
    with port.connect() as sock:
        end = Trust(ClusterKeys(FOREIGN)).greeting(Role.DIALER, port.channel)
        say(sock, end.hello)
        say(sock, end.receive(read_hello(sock)))
        assert rest(sock) in (REFUSED, b"")
    assert port.opened() == 0


def test_a_recording_of_a_good_greeting_is_refused(port: Port) -> None:
    with port.connect() as sock:
        end = CLUSTER.greeting(Role.DIALER, port.channel)
        say(sock, end.hello)
        proofs = end.receive(read_hello(sock))
        say(sock, proofs)
        end.receive(sock.recv(PROOF_BYTES, socket.MSG_WAITALL))
        assert end.done
    with port.connect() as sock:
        say(sock, end.hello + proofs + FRAMES)
        read_hello(sock)
        assert rest(sock) in (REFUSED, b"")
    assert port.opened() == 0


@pytest.mark.parametrize("corrected", [False, True])
def test_a_proof_for_another_channel_is_refused(port: Port, corrected: bool) -> None:
    """A part of the cluster speaks on another channel; a stranger carries its proof here."""
    for channel in set(Channel) - {port.channel}:
        with port.connect() as sock:
            end = CLUSTER.greeting(Role.DIALER, channel)
            say(sock, end.hello[:6] + bytes([port.channel]) + end.hello[7:] if corrected else end.hello)
            say(sock, end.receive(fit(read_hello(sock), end)))
            assert rest(sock) in (REFUSED, b"")
    assert port.opened() == 0


def test_the_proof_of_an_acceptor_is_refused(port: Port) -> None:
    with port.connect() as sock:
        end = CLUSTER.greeting(Role.ACCEPTOR, port.channel)
        theirs = read_hello(sock)
        assert len(theirs) == HELLO.size
        say(sock, end.hello)
        assert rest(sock) == b""
    assert port.opened() == 0


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(4096), b"EMBFERRY\0\1\0\1"])
def test_garbage_is_hung_up_on_at_once(port: Port, garbage: bytes) -> None:
    with port.connect() as sock:
        say(sock, garbage)
        assert rest(sock)[HELLO.size :] == b""
    assert port.opened() == 0


def test_half_a_greeting_and_silence_end(port: Port) -> None:
    good = CLUSTER.greeting(Role.DIALER, port.channel).hello
    for beginning in (b"", b"EM", hello(port.channel)[:-1], good + bytes(63)):
        with port.connect() as sock:
            say(sock, beginning)
            assert rest(sock)[HELLO.size :] == b""
    eventually(lambda: not port.listener._newcomers)
    assert port.opened() == 0


test_half_a_greeting_and_silence_end.hello_timeout = 0.2  # type: ignore[attr-defined]


def test_wrong_keys_are_logged_once_a_minute_with_the_address(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(5):
            with port.connect() as sock:
                end = Trust(ClusterKeys(FOREIGN)).greeting(Role.DIALER, port.channel)
                say(sock, end.hello)
                say(sock, end.receive(read_hello(sock)))
                rest(sock)
    (line,) = [record.getMessage() for record in caplog.records if "refused a" in record.getMessage()]
    assert "127.0.0.1" in line
    assert FOREIGN.written() not in caplog.text


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(4096), b"", b"EM"])
def test_connections_that_do_not_greet_are_logged_with_the_address(
    port: Port, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with port.connect() as sock:
                say(sock, sent)
                rest(sock)
        eventually(lambda: "refused a" in caplog.text)
    lines = {record.getMessage() for record in caplog.records if "refused a" in record.getMessage()}
    assert len(lines) == 1
    assert "at 127.0.0.1" in lines.pop()


test_connections_that_do_not_greet_are_logged_with_the_address.hello_timeout = 0.2  # type: ignore[attr-defined]


def test_a_probe_that_connects_and_leaves_is_not_logged(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        port.connect().close()
        eventually(lambda: not port.listener._newcomers)
    assert "refused a" not in caplog.text


# A stranger that is connected to


@pytest.fixture
def impostor() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SECONDS)
        yield listener


def test_a_receiver_that_returns_the_proof_never_sees_the_token(impostor: socket.socket) -> None:
    handle = msgspec.msgpack.encode(TcpHandle("127.0.0.1", impostor.getsockname()[1], b"t" * 16))
    sender = Endpoint(lambda wake: TcpTransport(wake, trust=CLUSTER))
    sender.transport.connect(handle)
    with impostor.accept()[0] as sock:
        theirs = read_hello(sock)
        say(sock, theirs[:7] + bytes([Role.ACCEPTOR]) + theirs[8:])
        proofs = sock.recv(PROOFS_BYTES, socket.MSG_WAITALL)
        say(sock, proofs[:PROOF_BYTES])
        assert rest(sock) == b""
    assert isinstance(sender.lost().error, WrongKey)
    sender.transport.close()


@pytest.mark.parametrize(
    ("mine", "theirs"), [(CLUSTER, KEYLESS), (KEYLESS, CLUSTER), (CLUSTER, Trust(ClusterKeys(FOREIGN)))]
)
def test_a_transfer_between_ends_that_do_not_share_the_key_fails_with_its_code(mine: Trust, theirs: Trust) -> None:
    encode = SendManager(LAYOUT, [TcpTransport(trust=mine)], trust=mine)
    language = ReceiveManager(Geometry(LAYOUT, 4, 8), [TcpTransport(trust=theirs)], trust=theirs)
    receiver = language.open(7, encode.endpoint)
    receiver.init()
    with pytest.raises(WrongKey, match="key"):
        wait(receiver, timeout=SECONDS)
    language.close()
    encode.close()


def test_no_part_listens_for_strangers_without_a_key() -> None:
    with pytest.raises(LocalProtocolError, match="embferry keys new"):
        SendManager(LAYOUT, [], host="0.0.0.0", advertise="127.0.0.1", trust=KEYLESS)
    transport = TcpTransport(host="0.0.0.0", advertise="127.0.0.1", trust=KEYLESS)
    with pytest.raises(LocalProtocolError, match="embferry keys new"):
        ReceiveManager(Geometry(LAYOUT, 4, 8), [transport], trust=KEYLESS)
    SendManager(LAYOUT, [], host="0.0.0.0", advertise="127.0.0.1", trust=CLUSTER).close()
    SendManager(LAYOUT, [], host="0.0.0.0", advertise="127.0.0.1", trust=Trust(insecure=True)).close()


# Rotation


def test_keys_are_replaced_while_transfers_go_on(tmp_path: Path) -> None:
    """Both ends have a file of their own, and the new key comes to one end first. Every transfer makes connections."""
    files = [tmp_path / name for name in ("encode", "language")]
    first = Key.new()
    for file in files:
        write_file(file, (first,), replace=False)
    mine, theirs = (Trust(ClusterKeys.of_file(file)) for file in files)
    encode = SendManager(LAYOUT, [TcpTransport(trust=mine)], trust=mine)
    language = ReceiveManager(Geometry(LAYOUT, 4, 8), [TcpTransport(trust=theirs)], trust=theirs)

    def transfer() -> None:
        embedding = np.random.default_rng(0).standard_normal((100, 64), np.float32)
        room = secrets.randbits(62)
        sender = encode.open(room)
        sender.init(total_tokens=100, content_digest=b"digest")
        sender.send_embedding(as_fields({"input_embeddings": embedding}))
        receiver = language.open(room, encode.endpoint)
        receiver.init()
        wait(receiver, timeout=SECONDS)
        assert np.array_equal(receiver.arrays()["input_embeddings"].view(np.float32), embedding)
        receiver.clear()
        _hang_up(encode, language)

    current: tuple[Key, ...] = (first,)
    for turn in range(4):
        current = (Key.new(), current[0])
        for file in files[:: 1 if turn % 2 else -1]:
            write_file(file, current, replace=True)
            transfer()
    assert encode.fault is None
    assert language.fault is None
    language.close()
    encode.close()


def _hang_up(encode: SendManager, language: ReceiveManager) -> None:
    """Ends the connections of both, so that the next transfer greets again."""
    control = language._runtime.control
    for peer in list(control._dialled.values()):  # type: ignore[attr-defined]
        if peer.connection is not None:
            peer.connection._sock.shutdown(socket.SHUT_RDWR)
    (transport,) = encode.transports.values()
    for link in list(transport._transport._links.values()):  # type: ignore[attr-defined]
        link._sock.shutdown(socket.SHUT_RDWR)
    eventually(lambda: not transport._transport._links)  # type: ignore[attr-defined]


def test_a_greeting_is_made_anew_for_each_connection() -> None:
    assert len({CLUSTER.greeting(Role.DIALER, Channel.TCP).hello for _ in range(10)}) == 10
    assert isinstance(CLUSTER.greeting(Role.DIALER, Channel.TCP), Greeting)
