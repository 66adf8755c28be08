"""Frames between control planes: order, answers, dialling, names, loss of a peer, the end."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import socket
import threading
from contextlib import ExitStack

import pytest

from embferry.protocol.errors import CapacityError, LocalProtocolError, PeerGone, VersionMismatch
from embferry.protocol.messages import MAX_FRAME_BYTES
from embferry.transfer.control import handshake
from embferry.transfer.control.contract import Received
from embferry.transfer.control.endpoint import host_and_port
from embferry.transfer.control.framing import frame
from embferry.transfer.control.sockets import SocketControl
from embferry.trust.greeting import Channel
from tests.trust import raw

from .conftest import HELLO, SECONDS, Net

pytestmark = pytest.mark.integration


def test_frames_arrive_in_order_and_answers_return_on_the_same_connection(net: Net) -> None:
    server, client = net.server(), net.plane()
    sent = [bytes([number]) * (1 + 37 * number) for number in range(200)]
    for data in sent:
        client.send(server.endpoint, data)
    net.until(lambda: len(net.data(server)) == len(sent))
    assert net.data(server) == sent
    peers = {event.peer for event in net.events[server]}
    assert len(peers) == 1
    for data in sent:
        server.send(*peers, data)
    net.until(lambda: len(net.data(client)) == len(sent))
    assert net.events[client] == [Received(server.endpoint, data) for data in sent]
    assert (server.connections, server.dropped_frames, client.dropped_frames) == (1, 0, 0)
    assert client.endpoint == ""


def test_the_longest_frame_arrives_and_a_longer_one_is_the_callers_error(net: Net) -> None:
    server, client = net.server(), net.plane()
    longest = os.urandom(MAX_FRAME_BYTES)
    client.send(server.endpoint, longest)
    for wrong in (b"", longest + b"x"):
        with pytest.raises(LocalProtocolError):
            client.send(server.endpoint, wrong)
    net.until(lambda: net.data(server) == [longest])


class Counting:
    """A socket that notes the number of buffers of each ``sendmsg``."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.calls: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._sock, name)

    def sendmsg(self, buffers: list[bytes]) -> int:
        self.calls.append(len(buffers))
        return self._sock.sendmsg(buffers)


def test_queued_frames_are_one_system_call(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"first")
    net.until(lambda: net.data(server))
    connection = client._dialled[server.endpoint].connection
    assert connection is not None
    counting = connection._sock = Counting(connection._sock)  # type: ignore[assignment]
    for _ in range(20):
        client.send(server.endpoint, bytes(200))
    net.until(lambda: len(net.data(server)) == 21)
    assert counting.calls == [20]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_versions_of_ip_work(net: Net, host: str) -> None:
    server, client = net.plane(host), net.plane()
    client.send(server.endpoint, b"x")
    net.until(lambda: net.data(server))


def test_the_advertised_host_stands_in_the_endpoint(net: Net) -> None:
    server = SocketControl(net.loop, "127.0.0.1", 0, "encode-0.example")
    assert server.endpoint.startswith("tcp://encode-0.example:")
    server.close()
    with pytest.raises(LocalProtocolError):
        SocketControl(net.loop, "127.0.0.1", 0, "a b")
    with pytest.raises(LocalProtocolError):
        SocketControl(net.loop, "encode-0")


# Names


def lookup_of(monkeypatch: pytest.MonkeyPatch, outcome: list[str] | OSError) -> None:
    def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert threading.current_thread().name == "embferry-name"
        if isinstance(outcome, OSError):
            raise outcome
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in outcome]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_every_address_of_a_name_is_tried(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = net.server(), net.plane()
    lookup_of(monkeypatch, ["127.0.0.2", "127.0.0.1"])  # nothing listens on the first
    endpoint = server.endpoint.replace("127.0.0.1", "encode-0")
    client.send(endpoint, b"x")
    net.until(lambda: net.data(server))
    assert not net.gone(client)


def test_a_name_that_does_not_exist_is_reported_at_once(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    client = net.plane()
    lookup_of(monkeypatch, socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    client.send("tcp://no-such-host:5", b"x")
    net.until(lambda: net.gone(client))
    (gone,) = net.gone(client)
    assert gone.peer == "tcp://no-such-host:5"
    assert gone.error.code == PeerGone.code
    assert "no-such-host" in str(gone.error)
    assert client.dropped_frames == 1


def test_a_name_server_out_of_order_is_asked_again_until_the_time_is_over(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = net.server(), net.plane(connect_timeout=1e6)
    endpoint = server.endpoint.replace("127.0.0.1", "encode-0")
    lookup_of(monkeypatch, socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    client.send(endpoint, b"x")
    peer = client._dialled[endpoint]
    net.until(lambda: "Temporary" in str(peer._error))
    lookup_of(monkeypatch, ["127.0.0.1"])
    net.until(lambda: net.data(server))


def test_a_lookup_that_hangs_does_not_delay_others(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = net.server(), net.plane()
    hang = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: hang.wait(SECONDS) and [])
    client.send("tcp://hangs:5", b"x")
    client.send(server.endpoint, b"y")
    net.until(lambda: net.data(server))
    net.advance(5)
    net.until(lambda: net.gone(client))
    assert "hangs" in str(net.gone(client)[0].error)
    hang.set()


def test_an_impossible_endpoint_is_reported_at_once(net: Net) -> None:
    client = net.plane()
    client.send("tcp://h:²", b"x")
    net.step(0)
    (gone,) = net.gone(client)
    assert (gone.peer, gone.error.code, client.dropped_frames) == ("tcp://h:²", LocalProtocolError.code, 1)


# Loss of a peer


def test_a_refused_endpoint_is_dialled_again_and_given_up_in_time(net: Net) -> None:
    listener, endpoint = net.listener()
    listener.close()
    client = net.plane()
    client.send(endpoint, b"x")
    peer = client._dialled[endpoint]
    net.until(lambda: "refused" in str(peer._error))
    assert not net.gone(client)
    net.advance(5)
    net.until(lambda: net.gone(client))
    (gone,) = net.gone(client)
    assert (gone.peer, gone.error.code, client.dropped_frames) == (endpoint, PeerGone.code, 1)
    assert "refused" in str(gone.error)
    client.send(endpoint, b"y")  # begins anew
    net.advance(1)
    assert len(net.gone(client)) == 1


def test_frames_sent_before_the_peer_listens_arrive(net: Net) -> None:
    listener, endpoint = net.listener()
    listener.close()
    client = net.plane()
    client.send(endpoint, b"early")
    peer = client._dialled[endpoint]
    net.until(lambda: "refused" in str(peer._error))
    server = net.plane(*host_and_port(endpoint))
    net.until(lambda: net.data(server) == [b"early"])


def test_a_broken_connection_is_dialled_again_while_the_peer_is_needed(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"one")
    net.until(lambda: net.data(server))
    first = net.events[server][0].peer
    server._acceptor.get(first).end(PeerGone("for the test"))  # type: ignore[union-attr]
    net.until(lambda: client._dialled[server.endpoint].connection is None)
    client.send(server.endpoint, b"two")
    net.until(lambda: net.data(server) == [b"one", b"two"])
    assert net.gone(server)[0].peer == first
    assert not net.gone(client)
    server.send(first, b"late")
    assert server.dropped_frames == 1, "the peer of the ended connection is gone"


def test_the_end_of_an_accepted_peer_comes_after_its_last_frame(net: Net) -> None:
    server = net.server()
    net.raw(server, HELLO + frame(b"last")).shutdown(socket.SHUT_WR)
    net.until(lambda: net.gone(server))
    received, gone = net.events[server]
    assert isinstance(received, Received)
    assert received.peer == gone.peer
    assert server.connections == 0


def test_a_peer_that_accepts_and_stays_silent_is_given_up(net: Net) -> None:
    listener, endpoint = net.listener()
    client = net.plane()
    client.send(endpoint, b"x")
    net.accept(listener)
    net.until(lambda: client._dialled[endpoint].connection)
    net.advance(5)
    net.until(lambda: net.gone(client))
    assert "hello" in str(net.gone(client)[0].error)


def test_a_peer_of_another_version_is_reported_at_once(net: Net) -> None:
    listener, endpoint = net.listener()
    client = net.plane()
    client.send(endpoint, b"x")
    net.accept(listener).sendall(frame(handshake._HELLO.pack(handshake.MAGIC, 2, 3)))
    net.until(lambda: net.gone(client))
    assert net.gone(client)[0].error.code == VersionMismatch.code


def test_frames_wait_for_the_hello(net: Net) -> None:
    listener, endpoint = net.listener()
    client = net.plane()
    client.send(endpoint, b"x")
    there = net.accept(listener)
    assert frame(net.read_frame(there)) == HELLO
    for _ in range(3):
        net.step(0)
    with pytest.raises(BlockingIOError):
        there.recv(1)
    there.sendall(HELLO)
    assert net.read_frame(there) == b"x"


def test_a_frame_cut_off_by_a_broken_connection_is_sent_again_whole(net: Net) -> None:
    listener, endpoint = net.listener()
    client = net.plane()
    sent = [os.urandom(1 << 20) for _ in range(3)]
    for data in sent:
        client.send(endpoint, data)
    there = net.accept(listener)
    net.until(lambda: client._dialled[endpoint].connection)
    connection = net.small_buffer(client._dialled[endpoint].connection)
    there.sendall(HELLO)
    net.until(lambda: connection._blocked)
    there.close()
    again = net.accept(listener)
    again.sendall(HELLO)
    assert frame(net.read_frame(again)) == HELLO
    assert net.read_frame(again) in sent


# Descriptors


def test_without_descriptors_dialling_is_repeated_and_says_so(net: Net) -> None:
    server, client = net.server(), net.plane()
    with all_descriptors_used():
        client.send(server.endpoint, b"x")
        net.advance(0.3)
        assert "Too many open files" in str(client._dialled[server.endpoint]._error)
        assert not net.gone(client)
        net.advance(5)
        (gone,) = net.gone(client)
        assert gone.error.code == CapacityError.code
        assert "ulimit" in str(gone.error)
        client.send(server.endpoint, b"y")
    net.until(lambda: net.data(server) == [b"y"])


def test_without_descriptors_accepting_pauses_and_goes_on(net: Net) -> None:
    server = net.server()
    known, unknown = net.raw(server, HELLO + frame(b"a")), socket.socket()
    net.until(lambda: net.data(server) == [b"a"])
    net.serve(server, b"a")
    with all_descriptors_used():
        unknown.connect(host_and_port(server.endpoint))
        unknown.sendall(raw.hello(Channel.CONTROL) + HELLO + frame(b"b"))
        known.sendall(frame(b"c"))
        net.until(lambda: net.data(server) == [b"a", b"c"])
    net.until(lambda: net.data(server) == [b"a", b"c", b"b"])
    unknown.close()


def all_descriptors_used() -> ExitStack:
    """Returns a context in which this process can open no descriptor."""
    stack = ExitStack()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    with contextlib.suppress(OSError):  # until none is left
        while True:
            stack.callback(os.close, os.dup(0))
    return stack


# Peers that are not needed, and the end


def test_connections_of_forgotten_peers_are_kept_up_to_a_number(net: Net) -> None:
    servers, client = [net.server() for _ in range(4)], net.plane(idle_connections=2)
    for server in servers:
        client.send(server.endpoint, b"x")
        net.until(lambda server=server: net.data(server))  # type: ignore[misc]
        client.forget(server.endpoint)
        client.forget(server.endpoint)
    assert list(client._dialled) == [server.endpoint for server in servers[2:]]
    net.until(lambda: len(net.gone(servers[0])) == 1)
    client.send(servers[2].endpoint, b"y")
    net.until(lambda: net.data(servers[2]) == [b"x", b"y"])
    assert len({event.peer for event in net.events[servers[2]]}) == 1, "the kept connection is used"
    client.forget("tcp://never-dialled:5")
    client.forget(object())


def test_a_forgotten_peer_is_not_dialled_again_nor_reported(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"x")
    net.until(lambda: net.data(server))
    client.forget(server.endpoint)
    server.close()
    net.until(lambda: not client._dialled)
    assert not net.gone(client)


def test_what_was_queued_before_a_peer_was_forgotten_is_still_sent(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"x")
    client.forget(server.endpoint)
    net.until(lambda: net.data(server) == [b"x"])


def test_close_sends_what_is_queued(net: Net) -> None:
    server, client = net.server(), net.plane()
    client.send(server.endpoint, b"x")
    net.until(lambda: net.data(server))
    server.send(net.events[server][0].peer, b"not read by the client")
    server.flush()
    client.send(server.endpoint, b"the last abort")
    client.close()
    client.close()
    net.until(lambda: net.gone(server))
    assert net.data(server) == [b"x", b"the last abort"]


def test_close_does_not_wait_long_for_a_peer_that_does_not_read(net: Net) -> None:
    server = net.server()
    sock = net.raw(server, HELLO + frame(b"a"))
    net.until(lambda: net.data(server))
    for _ in range(3):
        server.send(net.events[server][0].peer, bytes(1 << 20))
    server.close(linger_s=0.01)
    server.send(net.events[server][0].peer, b"x")
    assert server.poll() == []
    net.until(lambda: net.closed(sock))


def test_close_closes_every_descriptor(net: Net) -> None:
    gc.collect()  # descriptors of earlier tests
    before = len(os.listdir("/proc/self/fd"))
    server, client = net.server(), net.plane()
    listener, silent = net.listener()
    client.send(server.endpoint, b"x")
    client.send(silent, b"x")
    net.raw(server, b"")
    net.until(lambda: net.data(server))
    client.close()
    server.close()
    listener.close()
    for sock in net.sockets:
        sock.close()
    assert len(os.listdir("/proc/self/fd")) == before
