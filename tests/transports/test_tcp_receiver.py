"""The receiver of the tcp transport against senders that violate the format, stall or vanish, over raw sockets."""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embferry.testing.pair import CANARY, SMALL, TransportPair, block_ranges, eventually
from embferry.transports.net.listener import ListenLimits
from embferry.transports.tcp import TcpTransport, framing, receive_server
from embferry.transports.tcp.transport import TcpHandle
from embferry.transports.windows import MAX_RANGES, as_ranges, ranges_of
from embferry.trust.greeting import Channel
from tests.trust.raw import greet

pytestmark = pytest.mark.integration

TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def pair() -> Iterator[TransportPair]:
    """One pair for the whole file; writes between the two must succeed after every test."""
    pair = TransportPair(TcpTransport)
    yield pair
    pair.close()


@pytest.fixture(autouse=True)
def other_writes_succeed(pair: TransportPair) -> Iterator[None]:
    pair.bytes[:] = CANARY
    pair.receiver.poll()
    pair.receiver.events.clear()
    yield
    pair.receiver.transport.revoke(1)
    pair.admit(900, (0, 9))
    pair.bytes[:] = CANARY
    pair.expect(pair.lands(900, (0, 9)))
    pair.receiver.transport.revoke(900)


def handle_of(pair: TransportPair) -> TcpHandle:
    return msgspec.msgpack.decode(pair.handle, type=TcpHandle)


def connect(pair: TransportPair, *, with_token: bool = True) -> socket.socket:
    handle = handle_of(pair)
    sock = socket.create_connection((handle.host, handle.port), TIMEOUT_S)
    greet(sock, Channel.TCP)
    if with_token:
        sock.sendall(framing.hello(handle.token))
    return sock


def closed(sock: socket.socket) -> bool:
    """Waits for the receiver; returns whether it closes the connection without a verdict."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def receive_verdict(sock: socket.socket) -> tuple[int, int]:
    data = b""
    while len(data) < framing.VERDICT.size:
        part = sock.recv(framing.VERDICT.size - len(data))
        assert part, "the connection was closed before the verdict"
        data += part
    return framing.parse_verdict(data)


@pytest.mark.parametrize(
    ("first_frame", "reason"),
    [
        (framing.hello(b"0" * 16), "wrong token"),
        (b"GET / HTTP/1.1\r\nHost: here", "magic"),
        (framing.HELLO.pack(b"EMBF", 1, 1, 0, bytes(16)), "version 1"),
        (framing.HELLO.pack(b"EMBF", 3, 2, 0, bytes(16)), "kind 2"),
    ],
)
def test_a_bad_first_frame_closes_the_connection(
    pair: TransportPair, caplog: pytest.LogCaptureFixture, first_frame: bytes, reason: str
) -> None:
    with caplog.at_level(logging.WARNING), connect(pair, with_token=False) as sock:
        sock.sendall(first_frame)
        assert closed(sock)
    assert reason in caplog.text


def test_a_connection_without_the_token_is_closed() -> None:
    hurried = TransportPair(lambda wake: TcpTransport(wake, limits=ListenLimits(hello_timeout=0.05)))
    with connect(hurried, with_token=False) as sock:
        assert closed(sock)
    hurried.close()


BAD_HEADS = [
    framing.HEAD.pack(b"EMBG", 3, 2, 0, 1, 1, 1, 0, 8),
    framing.HEAD.pack(b"EMBF", 9, 2, 0, 1, 1, 1, 0, 8),
    framing.HEAD.pack(b"EMBF", 3, 3, 0, 1, 1, 1, 0, 8),
    framing.write_head(1, 1, 0, 8, b""),
    framing.write_head(1, 1, MAX_RANGES + 1, 8, b""),
    framing.write_head(1, 1, (1 << 32) - 1, 8, b""),
    framing.write_head(1, 1, 1, (1 << 64) - 1, b""),
    framing.write_head(1, 1, 1, 8, struct.pack("!QQ", 0, 7)),
    framing.write_head(1, 1, 2, 8, struct.pack("!QQQQ", 0, 9, 0, (1 << 64) - 1)),
    framing.HEAD.pack(b"EMBF", 3, 2, 0, 1, 1, 1, 0, 8) + struct.pack("!QQ", 0, 8),
]


@pytest.mark.parametrize("head", BAD_HEADS)
def test_a_malformed_frame_closes_the_connection(pair: TransportPair, head: bytes) -> None:
    pair.admit(1, (0,))
    with connect(pair) as sock:
        sock.sendall(head)
        assert closed(sock)
    pair.expect()


NUMBERS = st.one_of(st.integers(0, 20), st.integers(0, SMALL.region_bytes), st.integers(0, (1 << 64) - 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    with_token=st.booleans(),
    epoch=NUMBERS,
    ranges=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=4),
    count=st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
    payload=st.one_of(st.none(), NUMBERS),
    junk=st.binary(max_size=200),
    flip=st.one_of(st.none(), st.integers(0, 300)),
)
def test_fuzzed_frames_change_no_other_bytes(
    pair: TransportPair,
    with_token: bool,
    epoch: int,
    ranges: list[tuple[int, int]],
    count: int | None,
    payload: int | None,
    junk: bytes,
    flip: int | None,
) -> None:
    """Block 0 is open to epoch 1: only its bytes may change."""
    pair.receiver.transport.revoke(1)
    pair.admit(1, (0,))
    total = sum(length for _, length in ranges) if payload is None else payload
    told = len(ranges) if count is None else count
    encoded = b"".join(struct.pack("!QQ", *pair) for pair in ranges)
    frame = framing.write_head(epoch, 1, told, min(total, (1 << 64) - 1), encoded) + junk
    if flip is not None:
        changed = bytearray(frame)
        changed[flip % len(frame)] ^= 0xFF
        frame = bytes(changed)
    with connect(pair, with_token=with_token) as sock:
        received = 0
        try:
            sock.sendall(frame)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1 << 16):
                received += len(part)
        except TimeoutError:
            raise
        except OSError:  # the receiver may close the connection at any step
            received = 0
    assert received % framing.VERDICT.size == 0
    pair.receiver.poll()  # raises if the receiver's thread has ended
    for offset, length in block_ranges(SMALL, (0,)):
        pair.bytes[offset : offset + length] = CANARY
    pair.expect()


def test_a_slow_sender_delays_no_other(pair: TransportPair) -> None:
    pair.admit(1, (0, 1))
    pieces = pair.fill((1,))
    frame = framing.head(1, 5, ranges_of(pieces)) + b"".join(piece.source for piece in pieces)
    with connect(pair) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for at in range(0, len(frame), 7):
            sock.sendall(frame[at : at + 7])
            if at == 70:
                between = pair.fill((0,))
                assert pair.write(1, (0,), between) is None
        assert receive_verdict(sock) == (5, framing.WRITTEN)
    pair.expect(pieces, between)


def test_a_connection_that_is_cut_within_a_payload(pair: TransportPair) -> None:
    pair.admit(1, (1, 2))
    pieces = pair.fill((1, 2))
    frame = framing.head(1, 5, ranges_of(pieces)) + b"".join(piece.source for piece in pieces)
    for cut in (10, 60, len(frame) // 2, len(frame) - 1):
        with connect(pair) as sock:
            sock.sendall(frame[:cut])
            sock.shutdown(socket.SHUT_WR)
            assert closed(sock)
    assert pair.write(1, (1, 2), pieces) is None
    pair.expect(pieces)


@pytest.mark.parametrize("how", ["revoke", "close_blocks"])
def test_no_byte_lands_after_its_window_has_closed(pair: TransportPair, how: str) -> None:
    """Half has landed; the rest is discarded, the verdict is refused, and the connection can be used further."""
    pair.admit(1, (1, 2))
    pieces = pair.fill((1, 2))
    payload = b"".join(piece.source for piece in pieces)
    half = len(payload) // 2
    with connect(pair) as sock:
        sock.sendall(framing.head(1, 5, ranges_of(pieces)) + payload[:half])
        first = block_ranges(SMALL, (2,))[0][0]
        eventually(lambda: bool((pair.bytes[first : first + 200] != CANARY).any()))
        if how == "revoke":
            pair.receiver.transport.revoke(1)
            pair.receiver.revoked(1)
        else:
            pair.receiver.transport.close_blocks(1, (2,))
        pair.bytes[:] = CANARY
        sock.sendall(payload[half:])
        assert receive_verdict(sock) == (5, framing.REFUSED)
        pair.expect()
        pair.admit(2, (3,))
        sock.sendall(framing.head(2, 6, as_ranges([(3 * SMALL.block_size * 48, 4)])) + b"next")
        assert receive_verdict(sock) == (6, framing.WRITTEN)
        pair.receiver.transport.revoke(2)


def test_a_sender_that_does_not_read_its_verdicts_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_server, "MAX_UNSENT_BYTES", 1000)
    other = TransportPair(TcpTransport)
    transport = other.receiver.transport
    assert isinstance(transport, TcpTransport)
    assert transport._receiving is not None
    transport._receiving.listener.sock.setsockopt(
        socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
    )  # accepted sockets inherit it
    frames = framing.head(3, 5, as_ranges([(0, 0)])) * 1000
    handle = handle_of(other)
    with socket.socket() as sock:
        sock.settimeout(TIMEOUT_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect((handle.host, handle.port))
        greet(sock, Channel.TCP).sendall(framing.hello(handle.token))
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            flood(sock, frames)
    other.close()


def flood(sock: socket.socket, frames: bytes) -> None:
    for _ in range(200):
        sock.sendall(frames)
