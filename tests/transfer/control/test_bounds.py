"""Bounds on what a peer can make a control plane hold, and for how long."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterable

import pytest

from embferry.protocol.errors import LocalProtocolError
from embferry.transfer.control.connection import Connection
from embferry.transfer.control.contract import Received
from embferry.transfer.control.framing import HEADER, frame, header
from embferry.transfer.control.limits import ControlLimits
from embferry.transports.net.address import network_of
from embferry.transports.net.deadlines import Deadlines
from embferry.transports.net.loop import Loop
from embferry.transports.net.newcomer import Newcomer
from embferry.trust import greeting
from tests.trust import raw

from .conftest import HELLO, ClockedLoop, Net

pytestmark = pytest.mark.integration


def test_an_endless_message_is_cut_off_at_once(net: Net) -> None:
    server = net.server(frame_bytes=1000)
    sock = net.raw(server, HELLO + header(1 << 30, 0) + bytes(5000))
    net.until(lambda: net.closed(sock))
    assert (server.bad_frames, server.connections, server._shared.incomplete.used) == (1, 0, 0)


def test_another_protocol_is_cut_off_at_once(net: Net) -> None:
    server = net.server()
    sock = net.raw(server, b"GET / HTTP/1.1\r\n\r\n")
    net.until(lambda: net.closed(sock))
    assert not net.events[server]


def test_a_damaged_frame_ends_its_connection_only(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"one")
    net.until(lambda: net.data(server))
    damaged = bytearray(frame(b"a message"))
    damaged[-1] ^= 1
    sock = net.raw(server, HELLO + frame(b"whole") + damaged)
    net.until(lambda: net.closed(sock))
    client.send(server.endpoint, b"two")
    net.until(lambda: net.data(server) == [b"one", b"whole", b"two"])
    assert server.bad_frames == 1


def test_a_connection_without_a_hello_is_closed_in_time(net: Net) -> None:
    server = net.server()
    silent, slow = net.raw(server, b""), net.raw(server, HELLO[:5])
    net.until(lambda: len(server._acceptor.listener._newcomers) == 2)  # type: ignore[union-attr]
    net.advance(4)
    assert not net.closed(silent)
    net.advance(1)
    net.until(lambda: net.closed(silent) and net.closed(slow))
    assert not net.events[server]


def test_a_frame_that_does_not_end_is_given_up_and_an_idle_connection_is_not(net: Net) -> None:
    server = net.server()
    idle, slow = net.raw(server), net.raw(server, HELLO + frame(b"whole") + frame(b"begun")[:-1])
    net.until(lambda: server.connections == 2 and net.data(server))
    net.until(lambda: server._shared.incomplete.used)
    net.advance(9)
    slow.sendall(b"")
    net.advance(1)
    net.until(lambda: net.closed(slow))
    net.advance(1000)
    assert not net.closed(idle)
    assert len(net.gone(server)) == 1
    assert server._shared.incomplete.used == 0


def test_a_slow_frame_does_not_gain_time_from_each_byte(net: Net) -> None:
    server = net.server()
    slow = net.raw(server)
    with contextlib.suppress(ConnectionError):
        for byte in frame(bytes(20))[:-1]:
            slow.sendall(bytes([byte]))
            net.advance(0.5)
    net.until(lambda: net.closed(slow))


def test_incomplete_bytes_are_bounded_over_all_connections(net: Net) -> None:
    server = net.server(incomplete_bytes=10_000)
    begun = HELLO + frame(bytes(5000))[:4000]
    socks = [net.raw(server, begun)]
    net.until(lambda: server._shared.incomplete.used == 4000)
    socks += [net.raw(server, begun) for _ in range(2)]
    net.until(lambda: net.closed(socks[0]))
    net.until(lambda: server._shared.incomplete.used == 8000)
    assert [net.closed(sock) for sock in socks] == [True, False, False], "the frame that began first goes"


def test_a_peer_that_does_not_read_is_bounded_in_bytes_and_time(net: Net) -> None:
    server = net.server()
    sock = net.raw(server, HELLO + frame(b"a"))
    net.until(lambda: net.data(server))
    peer = net.events[server][0].peer
    for _ in range(40):
        server.send(peer, bytes(1 << 20))
        net.step(0)
    assert server.dropped_frames > 20
    assert server._shared.unsent.used <= 4 << 20
    net.advance(10)
    net.until(lambda: net.gone(server))
    assert server._shared.unsent.used == 0
    net.until(lambda: net.closed(sock))


def test_unsent_bytes_are_bounded_over_all_peers(net: Net) -> None:
    client = net.plane(unsent_bytes=1000)
    listener, endpoint = net.listener()
    client.send(endpoint, bytes(900))
    client.send(endpoint.replace("127.0.0.1", "127.0.0.2"), bytes(900))
    assert client.dropped_frames == 1
    listener.close()


def test_a_slow_reader_that_goes_on_reading_is_kept(net: Net) -> None:
    server = net.server()
    sock = net.raw(server, HELLO + frame(b"a"))
    net.until(lambda: net.data(server))
    peer = net.events[server][0].peer
    connection = net.small_buffer(server._acceptor.get(peer))  # type: ignore[union-attr]
    for _ in range(3):
        server.send(peer, bytes(1 << 20))
    net.until(lambda: connection._blocked)
    left = greeting.HELLO.size + len(HELLO) + 3 * (HEADER.size + (1 << 20))
    sock.setblocking(False)
    while left:
        before = connection.outgoing.bytes
        while left and connection.outgoing.bytes == before:
            with contextlib.suppress(BlockingIOError):
                left -= len(sock.recv(1 << 20))
            net.step()
        net.advance(9)
    assert not net.gone(server)


def test_a_full_table_closes_the_connection_that_served_no_transfer_for_longest(net: Net) -> None:
    server = net.server(connections=3)
    socks = [net.raw(server, HELLO + frame(b"%d" % number)) for number in range(3)]
    net.until(lambda: len(net.data(server)) == 3)
    net.serve(server, b"0", b"1", b"2")
    net.advance(11)
    net.serve(server, b"0", b"2")
    socks[1].sendall(frame(b"still here"))  # which is of use to no transfer
    net.until(lambda: b"still here" in net.data(server))
    newcomer = net.raw(server, HELLO + frame(b"new"))
    net.until(lambda: b"new" in net.data(server))
    assert (server.evicted_connections, server.refused_connections, server.connections) == (1, 0, 3)
    assert [net.closed(sock) for sock in (*socks, newcomer)] == [False, True, False, False]
    assert len(net.gone(server)) == 1


def test_a_table_full_of_connections_that_serve_transfers_refuses_the_newcomer(net: Net) -> None:
    server = net.server(connections=2)
    socks = [net.raw(server, HELLO + frame(b"x%d" % number)) for number in range(2)]
    net.until(lambda: len(net.data(server)) == 2)
    net.serve(server, b"x0", b"x1")
    net.advance(9)
    newcomer = net.raw(server)
    net.until(lambda: net.closed(newcomer))
    assert not any(net.closed(sock) for sock in socks)
    assert (server.refused_connections, server.evicted_connections) == (1, 0)
    assert not net.gone(server), "the refused one was never heard of"


@pytest.mark.parametrize("bounds", [{"connections": 3}, {"connections_per_address": 3}])
def test_busy_connections_of_no_transfer_keep_no_newcomer_out(net: Net, bounds: dict[str, float]) -> None:
    """They talk all the time, and those that had to make room come again."""
    server = net.server(**bounds)
    worker = net.raw(server, HELLO + frame(b"worker"))
    net.until(lambda: net.data(server) == [b"worker"])
    net.serve(server, b"worker")
    busy: list[socket.socket] = []
    for number in range(10):
        busy.append(net.raw(server, HELLO + frame(b"busy")))
        net.until(lambda: net.data(server).count(b"busy") > number)  # noqa: B023
        for sock in busy:
            with contextlib.suppress(ConnectionError):
                sock.sendall(frame(b"again"))
    newcomer = net.raw(server, HELLO + frame(b"new"))
    net.until(lambda: b"new" in net.data(server))
    assert (server.refused_connections, server.connections) == (0, 3)
    assert not net.closed(worker)
    assert not net.closed(newcomer)


def test_one_address_cannot_use_all_connections(net: Net) -> None:
    server = net.server(connections=10, connections_per_address=2)
    other = net.raw(server, HELLO + frame(b"other"), source="127.0.0.2")
    net.until(lambda: net.data(server) == [b"other"])
    first = [net.raw(server, HELLO + frame(b"x")) for _ in range(2)]
    net.until(lambda: server.connections == 3)
    net.advance(11)
    net.raw(server, HELLO + frame(b"y"))
    net.until(lambda: b"y" in net.data(server))
    assert not net.closed(other), "the idlest of all, but of another address"
    assert [net.closed(sock) for sock in first].count(True) == 1


def test_unfinished_handshakes_are_bounded_on_their_own(net: Net) -> None:
    server = net.server(handshakes=3)
    known = net.raw(server, HELLO + frame(b"x"))
    net.until(lambda: net.data(server))
    waiting = []
    for _ in range(5):
        waiting.append(net.raw(server, b""))
        net.until(lambda: waiting[-1].getsockname() in _peers(server._acceptor.listener._newcomers))  # type: ignore[union-attr]
    assert [net.closed(sock) for sock in waiting] == [True, True, False, False, False]
    assert not net.closed(known)


def test_one_address_cannot_use_all_handshakes(net: Net) -> None:
    server = net.server(handshakes_per_address=2)
    other = net.raw(server, b"", source="127.0.0.2")
    waiting = []
    for _ in range(3):
        waiting.append(net.raw(server, b""))
        net.until(lambda: waiting[-1].getsockname() in _peers(server._acceptor.listener._newcomers))  # type: ignore[union-attr]
    assert [net.closed(sock) for sock in (other, *waiting)] == [False, True, False, False]


def _peers(connections: Iterable[Newcomer[Connection]]) -> set[object]:
    return {connection.sock.getpeername() for connection in connections}


def test_nothing_is_read_while_received_frames_wait_to_be_polled(net: Net) -> None:
    server = net.server(received_bytes=1000)
    sock = net.raw(server, HELLO)
    sock.sendall(b"".join(frame(bytes(100)) for _ in range(2000)))
    for _ in range(50):
        net.loop.run_once(0)
    held = sum(len(event.data) for event in server._shared.events if isinstance(event, Received))
    assert held <= 1000 + (64 << 10)
    net.until(lambda: len(net.data(server)) == 2000)


def test_a_thousand_connections(net: Net) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 8192)), hard))
    server = net.server(connections_per_address=1000)
    socks = [net.raw(server, HELLO + frame(b"%d" % number)) for number in range(1000)]
    net.until(lambda: len(net.data(server)) == 1000)
    assert sorted(net.data(server), key=int) == [b"%d" % number for number in range(1000)]
    for event in list(net.events[server]):
        server.send(event.peer, b"answer to " + event.data)  # type: ignore[union-attr]
    net.step(0)
    answer = HELLO + frame(b"answer to 999")
    raw.read_hello(socks[999])
    assert socks[999].recv(len(answer), socket.MSG_WAITALL) == answer
    for sock in socks:
        sock.close()
    net.until(lambda: len(net.gone(server)) == 1000)
    assert server.connections == 0
    listener = server._acceptor.listener  # type: ignore[union-attr]
    assert not any((listener._networks, listener._newcomers_of, listener._has_served))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_bug_in_one_connections_handler_ends_that_connection_only(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"one")
    net.until(lambda: net.data(server))
    take = Connection._take

    def faulty(self: Connection, received: bytes) -> None:
        if b"poison" in received:
            raise MemoryError
        take(self, received)

    monkeypatch.setattr(Connection, "_take", faulty)
    sock = net.raw(server, HELLO + frame(b"poison"))
    net.until(lambda: net.closed(sock))
    client.send(server.endpoint, b"two")
    net.until(lambda: net.data(server) == [b"one", b"two"])


def test_a_bug_while_accepting_ends_that_connection_only(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = net.server(), net.plane()
    with monkeypatch.context() as patch:
        patch.setattr("embferry.transports.net.listener.set_keepalive", lambda sock: [][1])
        sock = net.raw(server)
        net.until(lambda: net.closed(sock))
    client.send(server.endpoint, b"x")
    net.until(lambda: net.data(server))


def test_a_bug_of_the_listener_is_survived(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server = net.server()
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "accept", lambda self: [][1])
        net.raw(server, HELLO + frame(b"x"))
        net.until(lambda: not server._acceptor.listener._scope._fds)  # type: ignore[union-attr]
    net.advance(1)
    net.until(lambda: net.data(server))


def test_an_ipv6_host_counts_as_itsnetwork_of() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:10.0.0.1") == network_of("10.0.0.1") == "10.0.0.1"
    assert network_of("fe80::1%eth0") == "fe80::/64"


def test_limits_are_checked() -> None:
    with pytest.raises(LocalProtocolError):
        ControlLimits(connections=0)


def test_deadlines_expire_in_order_of_their_start_and_survive_a_bug() -> None:
    loop = ClockedLoop()
    expired: list[str] = []

    def expire(item: str) -> None:
        expired.append(item)
        if item == "a":
            raise RuntimeError

    deadlines = Deadlines[str](loop, 10, expire)
    for item in ("a", "b", "c", "d"):
        deadlines.start(item)
        loop.time += 1
    deadlines.start("b")
    deadlines.stop("c")
    assert deadlines.earliest() == "a"
    for _ in range(20):
        loop.time += 1
        loop.run_once(0)
    assert expired == ["a", "d", "b"]
    assert "d" not in deadlines
    assert isinstance(loop, Loop)
    loop.close()
