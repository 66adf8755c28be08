"""The TLS socket of the event loop: partial records, blocked writes, bytes that wait inside, and streams cut off."""

from __future__ import annotations

import contextlib
import hashlib
import random
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embferry.transports.net.loop import READ, WRITE, Loop
from embferry.transports.net.stream import unwatch, watch
from embferry.transports.net.tls_socket import CALL_BYTES, TlsError, TlsSocket
from tests.trust.authority import Authority

MANY = 3 << 20


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    tls = Authority.make(tmp_path_factory.mktemp("ca")).tls("part")
    return tls.dialling(), tls.accepting()


@pytest.fixture
def raw() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets with small buffers, so that writes are partial."""
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    yield pair
    for sock in pair:
        sock.close()


Pair = tuple[TlsSocket, TlsSocket]


@pytest.fixture
def pair(raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext]) -> Pair:
    return (
        TlsSocket(raw[0], contexts[0], server_side=False, hostname="127.0.0.1"),
        TlsSocket(raw[1], contexts[1], server_side=True),
    )


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def attempt(call: Callable[[], object]) -> object:
    """Returns what a call returns, or None if it would block."""
    try:
        return call()
    except BlockingIOError:
        return None


def send_some(end: TlsSocket, left: memoryview) -> memoryview:
    """Returns what the end does not take of ``left``."""
    sent = attempt(lambda: end.send(left)) if left else 0
    assert isinstance(sent, int | None)
    return left[sent or 0 :]


def received_by(end: TlsSocket) -> bytes | None:
    """Returns what an end receives, or None if it would block."""
    got = attempt(lambda: end.recv(1 << 16))
    assert isinstance(got, bytes | None)
    return got


def shake(pair: Pair) -> None:
    """Does the handshake from both ends, without a loop."""
    while not all(end._shaken for end in pair):
        for end in pair:
            attempt(lambda end=end: end.recv(1))


def transmit(source: TlsSocket, target: TlsSocket, data: bytes) -> bytes:
    """Moves ``data`` without a loop, as far as both ends can without waiting."""
    left, received = memoryview(data), bytearray()
    while len(received) < len(data):
        before = len(left), len(received)
        if left:
            left = send_some(source, left)
        while (part := received_by(target)) is not None:
            assert part
            received += part
        assert (len(left), len(received)) != before or source._unsent, "no progress"
    return bytes(received)


@pytest.mark.parametrize("way", [1, -1])
def test_bytes_arrive_as_they_were_sent_over_a_socket_that_takes_little(pair: Pair, way: int) -> None:
    source, target = pair[::way]
    data = random.Random(1).randbytes(MANY)
    shake(pair)
    assert hashlib.sha256(transmit(source, target, data)).digest() == hashlib.sha256(data).digest()


def test_both_ways_at_once(pair: Pair) -> None:
    shake(pair)
    data = [random.Random(seed).randbytes(MANY) for seed in (1, 2)]
    left, received = [memoryview(each) for each in data], [bytearray(), bytearray()]
    while any(len(got) < MANY for got in received):
        for end in (0, 1):
            left[end] = send_some(pair[end], left[end])
            received[end] += received_by(pair[1 - end]) or b""
    assert received == data


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_a_handshake_and_records_that_arrive_in_parts(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], step: int
) -> None:
    """A relay between the ends passes ``step`` bytes at a time."""
    near, far = socket.socketpair(), socket.socketpair()
    for sock in (*near, *far):
        sock.setblocking(False)
    pair = (
        TlsSocket(near[0], contexts[0], server_side=False, hostname="127.0.0.1"),
        TlsSocket(far[1], contexts[1], server_side=True),
    )
    got, left = b"", memoryview(b"x" * 300)
    try:
        while len(got) < 300:
            left = send_some(pair[0], left)
            got += received_by(pair[1]) or b""
            for source, target in ((near[1], far[0]), (far[0], near[1])):
                with contextlib.suppress(BlockingIOError):
                    target.send(source.recv(step))
    finally:
        for end in pair:
            end.close()
        near[1].close()
        far[0].close()
    assert got == b"x" * 300


def test_buffers_are_gathered_and_scattered(pair: Pair) -> None:
    shake(pair)
    parts = [b"a", b"b" * 20_000, b"", b"c" * 100, memoryview(b"d" * 3)]
    data = b"".join(bytes(part) for part in parts)
    sent = 0
    targets = [bytearray(3), bytearray(19_999), bytearray(102)]
    views = [memoryview(target) for target in targets]
    taken = 0
    while taken < len(data):
        if sent < len(data):
            sent += attempt(lambda: pair[0].sendmsg(parts)) or 0  # type: ignore[operator]
        result = attempt(lambda: pair[1].recvmsg_into(views))
        count = result[0] if isinstance(result, tuple) else 0
        taken += count
        while count:
            step = min(count, views[0].nbytes)
            views[0] = views[0][step:]
            count -= step
            if not views[0].nbytes:
                del views[0]
    assert sent == len(data)
    assert b"".join(targets) == data


def test_a_call_sends_no_more_than_it_may_hold(pair: Pair) -> None:
    shake(pair)
    assert attempt(lambda: pair[0].send(b"x" * MANY)) is None
    assert len(pair[0]._unsent) < CALL_BYTES + (1 << 14)


class Reader:
    """A connection that reads one small piece whenever the loop says that it can."""

    def __init__(self, loop: Loop, stream: TlsSocket, piece: int) -> None:
        self.stream, self.piece = stream, piece
        self.received = bytearray()
        self.calls = 0
        self.error: OSError | None = None
        self.scope = loop.scope(lambda error: None)
        watch(self.scope, stream, READ, self.ready)

    def ready(self, events: int) -> None:
        self.calls += 1
        try:
            got = self.stream.recv(self.piece)
        except BlockingIOError:
            return
        except OSError as error:
            self.error = error
            self.end()
            return
        self.received += got
        if not got:
            self.end()

    def end(self) -> None:
        self.scope.end()
        self.stream.close()


def test_bytes_that_tls_has_taken_already_are_handled_before_the_loop_waits(pair: Pair, loop: Loop) -> None:
    """One record of 16 KB is read in pieces of 100 bytes: the kernel has nothing more to report after the first."""
    shake(pair)
    reader = Reader(loop, pair[1], 100)
    left = memoryview(b"y" * 16_000)
    for _ in range(10_000):
        left = send_some(pair[0], left)
        loop.run_once(0)
        if len(reader.received) == 16_000:
            break
    assert reader.received == b"y" * 16_000


def test_an_end_that_only_reads_finishes_the_handshake(pair: Pair, loop: Loop) -> None:
    """Both ends wait for the other to speak, so the loop alone drives the handshake, and does not spin."""
    readers = [Reader(loop, end, 100) for end in pair]
    for _ in range(1000):
        loop.run_once(0)
        if all(end._shaken for end in pair):
            break
    assert all(end._shaken for end in pair)
    before = [reader.calls for reader in readers]
    for _ in range(100):
        loop.run_once(0)
    assert [reader.calls for reader in readers] == before


def test_an_end_that_only_writes_does_not_spin_before_the_handshake(
    raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext], loop: Loop
) -> None:
    dialling = TlsSocket(raw[0], contexts[0], server_side=False, hostname="127.0.0.1")
    calls = []

    def ready(events: int) -> None:
        calls.append(events)
        with contextlib.suppress(BlockingIOError):
            dialling.send(b"hello")
            unwatch(loop, dialling)

    watch(loop, dialling, WRITE, ready)
    for _ in range(100):
        loop.run_once(0)
    assert not calls  # the other end is silent
    accepting = TlsSocket(raw[1], contexts[1], server_side=True)
    reader = Reader(loop, accepting, 100)
    for _ in range(100):
        loop.run_once(0)
    assert reader.received == b"hello"
    assert len(calls) == 1


def test_a_blocked_end_sends_the_rest_when_the_kernel_takes_it(pair: Pair, loop: Loop) -> None:
    shake(pair)
    left = memoryview(random.Random(3).randbytes(MANY))
    data = bytes(left)

    def ready(events: int) -> None:
        nonlocal left
        if events & WRITE and left:
            with contextlib.suppress(BlockingIOError):
                left = left[pair[0].send(left) :]
        watch(loop, pair[0], READ | (WRITE if left else 0), ready)

    watch(loop, pair[0], READ | WRITE, ready)
    reader = Reader(loop, pair[1], 1 << 16)
    for _ in range(100_000):
        loop.run_once(0)
        if len(reader.received) == MANY:
            break
    assert bytes(reader.received) == data


def test_an_orderly_end_is_no_error(pair: Pair) -> None:
    shake(pair)
    pair[0].send(b"last")
    pair[0].close()
    assert pair[1].recv(100) == b"last"
    assert pair[1].recv(100) == b""
    assert pair[1].recv(100) == b""


def test_half_of_the_stream_can_end_first(pair: Pair) -> None:
    shake(pair)
    pair[0].send(b"question")
    pair[0].shutdown(socket.SHUT_WR)
    assert pair[1].recv(100) == b"question"
    assert pair[1].recv(100) == b""
    pair[1].send(b"answer")
    assert pair[0].recv(100) == b"answer"


@pytest.mark.parametrize("shaken", [True, False])
def test_a_stream_that_is_cut_off_is_an_error_every_time(
    raw: tuple[socket.socket, socket.socket], pair: Pair, shaken: bool
) -> None:
    if shaken:
        shake(pair)
        pair[0].send(b"begun")
        assert pair[1].recv(100) == b"begun"
    raw[0].shutdown(socket.SHUT_WR)  # without TLS's end
    for _ in range(2):
        with pytest.raises(ConnectionError, match="was cut off") as caught:
            pair[1].recv(100)
        assert not isinstance(caught.value, TlsError)


def test_a_record_that_was_changed_is_an_error(raw: tuple[socket.socket, socket.socket], pair: Pair) -> None:
    shake(pair)
    middle = socket.socketpair()
    try:
        pair[0]._sock = middle[0]
        pair[0].send(b"a" * 100)
        record = bytearray(middle[1].recv(1 << 16))
        record[50] ^= 1
        raw[0].send(record)
        for call in (lambda: pair[1].recv(100), lambda: pair[1].send(b"x")):
            with pytest.raises(ConnectionError, match="broke: decryption failed or bad record mac") as caught:
                call()
            assert not isinstance(caught.value, TlsError)  # the next connection may do better
    finally:
        for sock in middle:
            sock.close()


@pytest.mark.parametrize("plain_end", [0, 1])
def test_plain_text_is_told_at_once(raw: tuple[socket.socket, socket.socket], pair: Pair, plain_end: int) -> None:
    raw[plain_end].send(b"EMBF\x01\x00\x00\x00" * 20)
    with pytest.raises(TlsError, match="the TLS handshake failed: the other end does not speak TLS") as caught:
        pair[1 - plain_end].recv(100)
    assert caught.value.failure.code == "tls_failed"


def test_an_end_that_allows_both_takes_plain_text_or_tls(
    raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    accepting = TlsSocket(raw[1], contexts[1], server_side=True, allow_plain=True)
    for call in (lambda: accepting.recv(10), lambda: accepting.send(b"x")):
        assert attempt(call) is None  # not decided yet
    raw[0].send(b"EMBF")
    assert accepting.recv(10) == b"EMBF"
    accepting.send(b"yes")
    assert raw[0].recv(10) == b"yes"
    assert accepting.is_plain


def test_an_end_that_allows_both_shakes_hands(
    raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    pair = (
        TlsSocket(raw[0], contexts[0], server_side=False, hostname="127.0.0.1"),
        TlsSocket(raw[1], contexts[1], server_side=True, allow_plain=True),
    )
    shake(pair)
    assert transmit(*pair, b"secret") == b"secret"
    assert not pair[1].is_plain


def test_the_ends_are_told_which_certificate_is_wrong(
    raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext], tmp_path: Path
) -> None:
    stranger = Authority.make(tmp_path).tls("stranger")
    pair = (
        TlsSocket(raw[0], stranger.dialling(), server_side=False, hostname="127.0.0.1"),
        TlsSocket(raw[1], contexts[1], server_side=True),
    )
    errors: list[str] = []
    for _ in range(5):
        for end in pair:
            try:
                attempt(lambda end=end: end.recv(1))
            except TlsError as error:
                errors.append(str(error))
    assert any("the certificate is not accepted" in text for text in errors)
    assert any("the other end does not know the CA" in text for text in errors)


def test_a_name_that_no_certificate_can_have_is_refused(
    raw: tuple[socket.socket, socket.socket], contexts: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    with pytest.raises(TlsError, match="cannot be verified"):
        TlsSocket(raw[0], contexts[0], server_side=False, hostname="")
