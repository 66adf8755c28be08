"""The sender of the http transport against receivers and strangers that break rules, stall or vanish; raw sockets."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.testing.pair import CANARY, Endpoint, TransportPair, eventually
from embferry.transports.contract import Piece
from embferry.transports.http import HttpTransport, serving
from embferry.transports.http.messages import HttpAddress, HttpHandle, Publication

pytestmark = pytest.mark.integration

TIMEOUT_S = 20.0
TOKEN = bytes(range(16))
HANDLE = msgspec.msgpack.encode(HttpHandle(TOKEN))


@pytest.fixture(scope="module")
def pair() -> Iterator[TransportPair]:
    """One pair for the whole file; writes between the two must succeed after every test."""
    pair = TransportPair(HttpTransport)
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def other_writes_succeed(pair: TransportPair) -> Iterator[None]:
    yield
    pair.admit(900, (0, 9))
    pair.bytes[:] = CANARY
    pair.expect(pair.lands(900, (0, 9)))
    pair.receiver.transport.revoke(900)


class Client:
    """Sends requests to one sender over one connection."""

    def __init__(self, transport: object, *, secret: bytes | None = None) -> None:
        assert isinstance(transport, HttpTransport)
        address = msgspec.msgpack.decode(transport.address, type=HttpAddress)
        port = int(address.base.rpartition(":")[2])
        self.secret = (address.secret if secret is None else secret).hex()
        self.sock = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        self.data = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def request(self, method: str, path: str, *fields: str) -> tuple[int, dict[str, str], bytes]:
        self.send(method, path, *fields)
        return self.response()

    def send(self, method: str, path: str, *fields: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {self.secret}", *fields]
        self.sock.sendall("\r\n".join([*lines, "", ""]).encode())

    def response(self) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self.data:
            self.more()
        start, _, self.data = self.data.partition(b"\r\n\r\n")
        first, *lines = start.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        status = int(first.split(" ")[1])
        length = 0 if status in (204, 304) else int(headers["Content-Length"])
        while len(self.data) < length:
            self.more()
        body, self.data = self.data[:length], self.data[length:]
        return status, headers, body

    def more(self) -> None:
        part = self.sock.recv(1 << 16)
        assert part, "the connection was closed before the response"
        self.data += part

    def closed(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def read_to_end(self) -> int:
        """Reads until the connection ends; returns how many bytes arrived in all."""
        count = len(self.data)
        try:
            while part := self.sock.recv(1 << 20):
                count += len(part)
        except ConnectionResetError:
            pass
        return count

    def poll(self, after: int = 0) -> list[Publication]:
        status, _, body = self.request("GET", f"/embferry/1/{TOKEN.hex()}?after={after}", "Prefer: wait=1")
        return msgspec.msgpack.decode(body, type=list[Publication]) if status == 200 else []


@pytest.fixture
def sender() -> Iterator[Endpoint]:
    """A sender, connected to a receiver whose requests the test makes."""
    sender = Endpoint(lambda wake: HttpTransport(wake, stall_timeout_s=2.0))
    sender.transport.connect(HANDLE)
    yield sender
    sender.transport.close()


def polled(client: Client) -> list[Publication]:
    """Returns the writes of the first poll that lists some: a busy sender may be slower than one poll waits."""
    found: list[Publication] = []
    eventually(lambda: bool(found.extend(client.poll()) or found))  # type: ignore[func-returns-value]
    return found


def publish(sender: Endpoint, client: Client, pair: TransportPair, ticket: int = 1) -> tuple[str, bytes]:
    """Publishes a write; returns its path and its bytes."""
    pieces = pair.fill((0,))
    sender.transport.write(HANDLE, 7, (0,), pieces, ticket)
    found = polled(client)[-1]
    assert found.epoch == 7
    ranges = msgspec.msgpack.encode([(piece.offset, piece.source.nbytes) for piece in pieces])
    numbers = [int.from_bytes(found.ranges[at : at + 8]) for at in range(0, len(found.ranges), 8)]
    assert msgspec.msgpack.encode(list(zip(numbers[::2], numbers[1::2], strict=True))) == ranges
    return f"/embferry/1/{TOKEN.hex()}/{found.number}", b"".join(piece.source for piece in pieces)


def test_a_write_is_a_resource_with_ranges_and_conditions(sender: Endpoint, pair: TransportPair) -> None:
    with Client(sender.transport) as client:
        path, data = publish(sender, client, pair)
        status, headers, body = client.request("GET", path)
        assert (status, body, headers["Accept-Ranges"]) == (200, data, "bytes")
        etag = headers["ETag"]
        assert re.fullmatch(r'"[0-9]+-[0-9a-f]{16}"', etag)
        status, headers, body = client.request("GET", path, "Range: bytes=5-", f"If-Range: {etag}")
        assert (status, body, headers["Content-Range"]) == (206, data[5:], f"bytes 5-{len(data) - 1}/{len(data)}")
        assert client.request("GET", path, "Range: bytes=-3")[2] == data[-3:]
        assert client.request("GET", path, "Range: bytes=5-", 'If-Range: "x"')[::2] == (200, data)
        status, headers, _ = client.request("GET", path, f"Range: bytes={len(data)}-")
        assert (status, headers["Content-Range"]) == (416, f"bytes */{len(data)}")
        assert client.request("GET", path, f"If-None-Match: {etag}")[0] == 304
        assert client.request("GET", path, 'If-Match: "x"')[0] == 412
        assert client.request("DELETE", path, 'If-Match: "x"')[0] == 412
        status, headers, _ = client.request("POST", path)
        assert (status, headers["Allow"]) == (405, "GET, HEAD, DELETE")
        assert client.request("GET", f"http://elsewhere:1{path}")[2] == data, "absolute form"


@pytest.mark.parametrize(("outcome", "retryable"), [("written", None), ("refused", False), ("failed", True)])
def test_the_receiver_reports_the_outcome_of_a_write_once(
    sender: Endpoint, pair: TransportPair, outcome: str, retryable: bool | None
) -> None:
    with Client(sender.transport) as client:
        path, _ = publish(sender, client, pair)
        assert client.request("DELETE", f"{path}?outcome=nonsense")[0] == 404
        assert client.request("DELETE", f"{path}?outcome={outcome}")[0] == 204
        error = sender.written(1)
        assert (None if error is None else error.retryable) == retryable
        assert client.request("DELETE", f"{path}?outcome=refused")[0] == 404
        assert client.request("GET", path)[0] == 404
    sender.poll()
    assert len(sender.events) == 1


def test_a_poll_lists_the_writes_after_a_number_in_order(sender: Endpoint, pair: TransportPair) -> None:
    with Client(sender.transport) as client:
        for ticket in range(1, 4):
            sender.transport.write(HANDLE, 7, (0,), pair.fill((0,)), ticket)
        eventually(lambda: len(numbers(client)) == 3)
        first, second, third = numbers(client)
        assert first < second < third
        assert [found.number for found in client.poll(second)] == [third]
        assert client.poll(third) == []


def numbers(client: Client) -> list[int]:
    return [found.number for found in client.poll()]


def test_a_new_poll_replaces_the_pending_one(sender: Endpoint, pair: TransportPair) -> None:
    """A proxy may keep the connection of the earlier poll open after the receiver has closed its own."""
    with Client(sender.transport) as stale, Client(sender.transport) as client:
        poll = f"/embferry/1/{TOKEN.hex()}?after=0"
        transport = sender.transport
        assert isinstance(transport, HttpTransport)
        stale.send("GET", poll, "Prefer: wait=30")
        eventually(lambda: transport._server is not None and transport._server.is_polled(TOKEN.hex()))
        client.send("GET", poll, "Prefer: wait=30")
        assert stale.response()[0] == 204
        transport.write(HANDLE, 7, (0,), pair.fill((0,)), 1)
        assert client.response()[0] == 200


def test_requests_without_the_secret_are_refused(sender: Endpoint, pair: TransportPair) -> None:
    with Client(sender.transport) as client:
        path, _ = publish(sender, client, pair)
        for method, target in [("GET", path), ("DELETE", path), ("GET", f"/embferry/1/{TOKEN.hex()}"), ("GET", "/")]:
            with Client(sender.transport, secret=bytes(16)) as stranger:
                assert stranger.request(method, target)[0] == 403
                assert stranger.closed()
        assert client.request("GET", f"/embferry/1/{bytes(16).hex()}/1")[0] == 404
        assert client.request("GET", "/embferry/2/")[0] == 404
        assert client.request("PUT", f"/embferry/1/{TOKEN.hex()}")[0] == 405
        assert client.request("DELETE", path)[0] == 204
    assert sender.written(1) is None


BAD_REQUESTS = [
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/3\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"A" * 20_000,
    b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 200 + b"\r\n",
]


@pytest.mark.parametrize("data", BAD_REQUESTS)
def test_a_malformed_request_gets_400_and_ends_the_connection(pair: TransportPair, data: bytes) -> None:
    with Client(pair.sender.transport) as client:
        client.sock.sendall(data)
        status, headers, _ = client.response()
        assert (status, headers["Connection"]) == (400, "close")
        assert client.closed()


def test_a_request_with_a_body_is_refused(pair: TransportPair) -> None:
    with Client(pair.sender.transport) as client:
        assert client.request("POST", "/", "Content-Length: 99999999999")[0] == 413
        assert client.closed()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["GET", "DELETE", "HEAD", "get", "\xff"]),
    st.text(alphabet="/embferry1?=&%after outcom0123456789abcdef", max_size=80),
    st.lists(st.text(alphabet="ab:-, =\t\x00\r\nbytes0123456789", max_size=30), max_size=4),
    st.booleans(),
)
def test_fuzzed_requests_do_not_end_the_thread(
    pair: TransportPair, method: str, path: str, fields: list[str], after_prefix: bool
) -> None:
    with Client(pair.sender.transport) as client:
        start = f"/embferry/1/{bytes(16).hex()}" if after_prefix else "/"
        head = "\r\n".join([f"{method} {start}{path} HTTP/1.1", "Host: x", *fields, "Connection: close", "", ""])
        client.sock.sendall(head.encode("latin-1"))
        client.sock.shutdown(socket.SHUT_WR)
        while client.sock.recv(1 << 16):
            pass
    pair.sender.poll()  # raises if the sender's thread has ended


def test_pipelined_requests_are_served_in_order(sender: Endpoint, pair: TransportPair) -> None:
    with Client(sender.transport) as client:
        path, data = publish(sender, client, pair)
        for at in range(200):
            client.send("GET", path, f"Range: bytes={at}-{at}")
        assert [client.response()[2] for _ in range(200)] == [data[at : at + 1] for at in range(200)]


def test_a_request_behind_a_pending_poll_is_served_after_it(sender: Endpoint) -> None:
    with Client(sender.transport) as client:
        poll = f"/embferry/1/{TOKEN.hex()}"
        client.send("GET", f"{poll}?after=0", "Prefer: wait=1")
        client.send("GET", f"{poll}/1")
        assert [client.response()[0] for _ in range(2)] == [204, 404]


def test_a_request_that_arrives_byte_by_byte_is_served(sender: Endpoint, pair: TransportPair) -> None:
    with Client(sender.transport) as client:
        path, data = publish(sender, client, pair)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.secret}\r\n\r\n".encode():
            client.sock.sendall(bytes([byte]))
        assert client.response()[2] == data


def test_a_connection_without_a_request_is_closed(pair: TransportPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "REQUEST_S", 0.05)
    with Client(pair.sender.transport) as client:
        assert client.closed()


# Receivers that vanish


def test_a_receiver_that_sends_no_request_is_a_lost_link(pair: TransportPair) -> None:
    sender = Endpoint(lambda wake: HttpTransport(wake, stall_timeout_s=1.0))
    sender.transport.connect(HANDLE)
    sender.transport.write(HANDLE, 1, (0,), pair.fill((0,)), 1)
    error = sender.written(1)
    assert error is not None
    assert error.retryable
    assert "no request" in str(sender.lost().error)
    sender.transport.connect(HANDLE)  # a new attempt
    with Client(sender.transport) as client:
        path, _ = publish(sender, client, pair, ticket=2)
        assert client.request("DELETE", path)[0] == 204
    assert sender.written(2) is None
    sender.transport.close()


@pytest.mark.parametrize("fetching", [False, True])
def test_a_receiver_that_vanishes_is_a_lost_link(fetching: bool) -> None:
    """After its poll, or in the middle of a body, whose connection is then closed so that the source is free."""
    sender = Endpoint(lambda wake: HttpTransport(wake, stall_timeout_s=1.0))
    sender.transport.connect(HANDLE)
    with Client(sender.transport) as client:
        pieces = [Piece(memoryview(bytes(32 << 20)), 0)]  # more than socket buffers hold
        sender.transport.write(HANDLE, 1, (0,), pieces, 1)
        found = polled(client)
        if fetching:
            client.send("GET", f"/embferry/1/{TOKEN.hex()}/{found[0].number}")
            client.more()
        error = sender.written(1)
        assert error is not None
        assert error.retryable
        sender.lost()
        if fetching:
            assert client.read_to_end() < pieces[0].source.nbytes
    sender.transport.close()


def test_a_receiver_that_polls_and_never_fetches_is_a_lost_link(pair: TransportPair) -> None:
    sender = Endpoint(lambda wake: HttpTransport(wake, stall_timeout_s=0.5, poll_s=1.0))
    sender.transport.connect(HANDLE)
    with Client(sender.transport) as client:
        publish(sender, client, pair)
        while client.request("GET", f"/embferry/1/{TOKEN.hex()}?after=0", "Prefer: wait=1")[0] == 200:
            pass
    error = sender.written(1)
    assert error is not None
    assert error.retryable
    assert re.search("not fetched a byte", str(sender.lost().error))
    sender.transport.close()


def test_a_receiver_behind_a_slow_proxy_is_not_lost(pair: TransportPair) -> None:
    """The sender has sent all bytes; the receiver's polls report that more and more of them have landed."""
    sender = Endpoint(lambda wake: HttpTransport(wake, stall_timeout_s=20.0))
    sender.transport.connect(HANDLE)
    transport = sender.transport
    assert isinstance(transport, HttpTransport)
    link, poll = transport._links[HANDLE], f"/embferry/1/{TOKEN.hex()}?after=1000000&landed="
    with Client(transport) as client:
        path, _ = publish(sender, client, pair)
        since = link._progress_at
        for landed in (1, 2, 3, 4):
            assert client.request("GET", f"{poll}{landed}", "Prefer: wait=0")[0] == 204
            assert link._progress_at > since, "not noted as progress"
            since = link._progress_at
        assert client.request("GET", f"/embferry/1/{TOKEN.hex()}?after=0&landed=4")[0] == 200
        assert link._progress_at == since, "noted as progress without any"
        assert client.request("DELETE", path)[0] == 204
    assert sender.written(1) is None
    transport.close()


def test_an_idle_link_is_kept() -> None:
    """For longer than the time-out, with a poll now and then."""
    pair = TransportPair(lambda wake: HttpTransport(wake, stall_timeout_s=2.0, poll_s=1.0))
    pair.admit(1, (0,))
    transport = pair.sender.transport
    assert isinstance(transport, HttpTransport)
    link = transport._links[pair.handle]
    heard = [link._heard_at]

    def heard_again() -> bool:
        if link._heard_at != heard[-1]:
            heard.append(link._heard_at)
        return len(heard) > 8

    eventually(heard_again)
    pair.sender.poll()
    assert pair.sender.events == []
    pair.expect(pair.lands(1, (0,)))
    pair.close()
