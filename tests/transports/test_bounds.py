"""Bounds on the connections that peers of a transport can make this process hold."""

from __future__ import annotations

import resource
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import pytest

from embferry.testing.pair import Endpoint, TransportPair, eventually
from embferry.transports.contract import ConnectionCounts
from embferry.transports.http import HttpTransport
from embferry.transports.http.messages import HttpAddress
from embferry.transports.leased.mooncake import MooncakeTransport
from embferry.transports.net.listener import ListenLimits
from embferry.transports.tcp import TcpTransport, framing
from embferry.transports.tcp.transport import TcpHandle
from embferry.trust.greeting import Channel
from tests.transports import leased_peer
from tests.transports.leased_peer import frame, receive
from tests.trust.raw import hello

pytestmark = pytest.mark.integration

SECONDS = 20.0
LIMITS = ListenLimits(connections=4, connections_per_address=3, handshakes=2, idle_time=0.05)


def listener_of(pair: TransportPair) -> Any:
    """Returns the listener of either end."""
    for end in (pair.receiver, pair.sender):
        if (found := end.transport._listener()) is not None:  # type: ignore[attr-defined]
            return found
    raise AssertionError("nothing listens")


def counts(pair: TransportPair) -> ConnectionCounts:
    for end in (pair.receiver, pair.sender):
        if end.transport._listener() is not None:  # type: ignore[attr-defined]
            return end.transport.connections
    raise AssertionError("nothing listens")


def tcp_hello(pair: TransportPair) -> bytes:
    return hello(Channel.TCP) + framing.hello(msgspec.msgpack.decode(pair.handle, type=TcpHandle).token)


def http_hello(pair: TransportPair) -> bytes:
    secret = msgspec.msgpack.decode(pair.sender.transport.address, type=HttpAddress).secret.hex()
    lines = [f"GET /embferry/1/{'0' * 32} HTTP/1.1", "Host: x", f"Authorization: Bearer {secret}", "Prefer: wait=0"]
    return "\r\n".join([*lines, "", ""]).encode()


KINDS = {"tcp": (TcpTransport, tcp_hello), "http": (HttpTransport, http_hello)}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]


class Strangers:
    """Connections to the listener of a pair."""

    def __init__(self, pair: TransportPair, hello: Callable[[TransportPair], bytes]) -> None:
        self._address, self._hello = ("127.0.0.1", listener_of(pair).port), hello(pair)
        self.socks: list[socket.socket] = []

    def connect(self, *, introduced: bool) -> socket.socket:
        sock = socket.create_connection(self._address, SECONDS)
        self.socks.append(sock)
        if introduced:
            sock.sendall(self._hello)
        return sock

    def close(self) -> None:
        for sock in self.socks:
            sock.close()


@pytest.fixture
def make(kind: Any) -> Iterator[Callable[[ListenLimits], tuple[TransportPair, Strangers]]]:
    made: list[Any] = []

    def make(limits: ListenLimits) -> tuple[TransportPair, Strangers]:
        transport, hello = kind
        pair = TransportPair(lambda wake: transport(wake, limits=limits))
        made.append(pair)
        made.append(Strangers(pair, hello))
        return made[-2], made[-1]

    yield make
    for one in reversed(made):
        one.close()


def is_closed(sock: socket.socket) -> bool:
    """Returns whether the peer has closed the connection, after reading what it had sent."""
    while select.select([sock], [], [], 0)[0]:
        try:
            if not sock.recv(1 << 16):
                return True
        except ConnectionError:
            return True
    return False


def writes(pair: TransportPair) -> None:
    """Writes over the connection that the pair has or makes."""
    pair.receiver.transport.revoke(1)
    pair.admit(1, (0,))
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:  # a busy machine may seem idle to the listener, also with the own connection
        pair.sender.transport.connect(pair.handle)
        pair.receiver.transport.connect_to_sender(pair.sender.transport.address)
        if pair.write(1, (0,), pair.fill((0,))) is None:
            return
    pytest.fail("no write succeeds")


def test_connections_that_do_not_introduce_themselves_are_bounded_and_timed_out(make: Any) -> None:
    pair, strangers = make(replace(LIMITS, hello_timeout=0.2))
    writes(pair)
    waiting = [strangers.connect(introduced=False) for _ in range(6)]
    eventually(lambda: sum(map(is_closed, waiting)) >= 4)
    eventually(lambda: all(map(is_closed, waiting)))
    eventually(lambda: not listener_of(pair)._newcomers)  # the listener forgets them after it has closed them
    writes(pair)


def test_an_idle_connection_makes_room_for_one_of_the_same_address(make: Any) -> None:
    pair, strangers = make(LIMITS)
    writes(pair)
    for _ in range(8):
        newcomer = strangers.connect(introduced=True)
        eventually(lambda sock=newcomer: is_served(pair, sock))
    assert sum(not is_closed(sock) for sock in strangers.socks) <= 3
    assert counts(pair).evicted + counts(pair).refused >= 5
    assert counts(pair).open <= 3
    writes(pair)


def is_served(pair: TransportPair, sock: socket.socket) -> bool:
    """Returns whether a connection has been taken or refused by the listener."""
    name = sock.getsockname()
    return is_closed(sock) or any(
        getattr(one, "peer", None) == name or getattr(one, "_peer", None) == name for one in listener_of(pair)._open
    )


def test_busy_connections_are_kept_and_the_newcomer_is_refused(make: Any) -> None:
    pair, strangers = make(replace(LIMITS, idle_time=1000.0, handshakes=100))
    writes(pair)
    socks = [strangers.connect(introduced=True) for _ in range(6)]
    eventually(lambda: sum(map(is_closed, socks)) >= 3)
    assert counts(pair).refused >= 3
    assert counts(pair).evicted == 0
    writes(pair)


def test_bounds_stay_below_the_limit_of_descriptors(make: Any, kind: Any) -> None:
    """Idle connections, introduced or not, cannot use up the descriptors of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        pair, strangers = make(ListenLimits(idle_time=0.05))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for introduced in (False, True):
        for _ in range(100):
            strangers.connect(introduced=introduced)
    eventually(lambda: sum(map(is_closed, strangers.socks)) >= 200 - 512 // 8 - 512 // 16)
    table = listener_of(pair)
    assert len(table._newcomers) <= 512 // 16 + 1, "one more, until another has been closed for it"
    assert counts(pair).open <= 512 // 8
    writes(pair)


def test_the_kernel_ends_accepted_connections_of_hosts_that_are_gone(make: Any) -> None:
    pair, strangers = make(LIMITS)
    strangers.connect(introduced=True)
    eventually(lambda: bool(listener_of(pair).connections))
    for connection in listener_of(pair).connections:
        assert connection._sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


@pytest.mark.engines
def test_a_sender_with_a_lease_never_makes_room() -> None:
    """Its writes may be on the way: only idle senders of the leased transports are closed."""
    pair = TransportPair(partial(MooncakeTransport, limits=ListenLimits(connections=2, idle_time=0.01)))
    table = listener_of(pair)
    eventually(lambda: len(table) == 1)  # the pair's own sender, which might be accepted only later
    pair.sender.transport.disconnect(pair.handle)
    eventually(lambda: not table.connections)
    pair.admit(1, (0,))
    with leased_peer.holder(pair, 1, 1) as holder, leased_peer.connected(pair) as idle:
        leased_peer.greet(pair, idle)
        eventually(lambda: table._loop.now() - max(table._open.values()) > 0.02)
        newcomer = Endpoint(MooncakeTransport)
        newcomer.transport.connect(pair.handle)
        newcomer.transport.write(pair.handle, 1, (0,), pair.fill((0,)), 1)
        assert newcomer.written(1) is None
        assert receive(idle) is None
        holder.sendall(frame(leased_peer.m.Ping(), 2))
        assert receive(holder) == leased_peer.m.Pong()
        newcomer.transport.close()
    pair.close()


def test_limits_are_checked() -> None:
    with pytest.raises(Exception, match="greater than 0"):
        ListenLimits(handshakes=0)
