"""The receiver of the http transport against faulty senders, broken connections and malicious addresses."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.errors import LocalProtocolError, TransportError
from embferry.testing.pair import CANARY, DEADLINE_S, LARGE, SMALL, Endpoint, TransportPair, eventually
from embferry.testing.proxy import ChaosProxy
from embferry.transports.contract import Window
from embferry.transports.http import HttpTransport, remote_sender
from embferry.transports.http.messages import MAX_POLL_BYTES, HttpAddress
from tests.transports.scripted_http_sender import Scripted, ScriptedSender, body_response, poll_response, publication

pytestmark = pytest.mark.integration

RANGES = [(0, 100), (200, 28)]  # in block 0 of the first field
DATA = bytes(range(128))


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    """A pair with block 0 open to epoch 1; at its end, a write between the two must still succeed."""
    pair = TransportPair(lambda wake: HttpTransport(wake, stall_timeout_s=1.0))
    pair.admit(1, (0,))
    yield pair
    pair.bytes[:] = CANARY
    pair.admit(900, (9, 1))
    pair.expect(pair.lands(900, (9, 1)))
    pair.close()


def check_rest_is_untouched(pair: TransportPair) -> None:
    for offset, size in pair.region.rows:  # block 0 is the first of each
        pair.bytes[offset : offset + size] = CANARY
    pair.expect()


def landed(pair: TransportPair) -> bytes:
    return b"".join(bytes(pair.bytes[offset : offset + length]) for offset, length in RANGES)


# Addresses

GOOD = "http://127.0.0.1:80"
BAD_BASES = [
    "",
    "http://",
    "https://127.0.0.1",
    "ftp://127.0.0.1",
    "127.0.0.1:80",
    "http://name.example:80",
    "http://0.0.0.0:1",
]
BAD_BASES += ["http://127.0.0.1:0", "http://127.0.0.1:65536", "http://127.0.0.1:x", "http://[::1", "http://[::]:80"]
BAD_BASES += ["http://u:p@127.0.0.1", GOOD + "/a?b", GOOD + "/a#b", GOOD + "/a b", GOOD + "/\r\nX: y", GOOD + "/%0d%0a"]
BAD_BASES += [
    "http://224.0.0.1",
    "http://[fe80::1%25eth0]:80",
    GOOD + "/" + "a" * 65,
    GOOD + "/a" * 9,
    "http://127.0.0.1\n:80",
]


@pytest.mark.parametrize("base", BAD_BASES)
def test_an_unusable_base_url_is_refused(base: str) -> None:
    check_refused(msgspec.msgpack.encode(HttpAddress(base, bytes(16))))


def test_a_malformed_address_is_refused() -> None:
    good = msgspec.msgpack.encode(HttpAddress(GOOD, bytes(16)))
    for bad in [b"", b"\xc1", None, "text", good + b"\0", b"x" * 100_000, good[:-1], msgspec.msgpack.encode([GOOD])]:
        check_refused(bad)
    check_refused(msgspec.msgpack.encode(HttpAddress(GOOD, bytes(15))))
    check_refused(msgspec.msgpack.encode(HttpAddress(GOOD + "/" + "/a" * 500, bytes(16))))


def check_refused(address: Any) -> None:
    buffers, transport = MultimodalDataBuffers(SMALL, shared=False), HttpTransport()
    transport.register(buffers)
    with pytest.raises(TransportError) as caught:
        transport.connect_to_sender(address)
    assert not caught.value.retryable
    assert not transport._senders
    transport.close()
    buffers.close()


def test_a_sender_that_is_reached_twice_is_polled_once(pair: TransportPair) -> None:
    with ScriptedSender([]) as sender:
        for _ in range(3):
            pair.receiver.transport.connect_to_sender(sender.address)
        eventually(lambda: sender.polls == 1)
        receiver = pair.receiver.transport
        assert isinstance(receiver, HttpTransport)
        assert len(receiver._senders) == 2
        assert len(sender.address) <= 1024


def test_invalid_settings_are_refused() -> None:
    for settings in ({"poll_s": 31.0}, {"stall_timeout_s": 0.0}, {"connections": 0}, {"poll_s": 0.5}):
        with pytest.raises(LocalProtocolError):
            HttpTransport(**settings)  # type: ignore[arg-type]  # only numbers are passed here
    with pytest.raises(TransportError):
        HttpTransport(proxy="socks5://127.0.0.1:1080")


# Responses to polls

BAD_POLLS: dict[str, bytes] = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "not MessagePack": body_response(b"\xc1"),
    "not a list": poll_response({"a": 1}),
    "numbers go back": poll_response([[2, 1, '"a"', 16, bytes(8) + b"\0" * 7 + b"\x10"], [1, 1, '"a"', 0, bytes(16)]]),
    "number zero": publication(RANGES, number=0),
    "negative epoch": publication(RANGES, epoch=-1),
    "lengths do not add up": poll_response([[1, 1, '"a"', 5, bytes(16)]]),
    "a length that wraps": poll_response([[1, 1, '"a"', 2, (b"\xff" * 8) * 2 + bytes(8) + bytes(7) + b"\3"]]),
    "part of a range": poll_response([[1, 1, '"a"', 0, bytes(24)]]),
    "too many writes": poll_response([[number, 1, '"a"', 0, bytes(16)] for number in range(1, 300)]),
    "no ranges": poll_response([[1, 1, '"a"', 0, b""]]),
    "an etag with a line break": poll_response([[1, 1, '"a\r\nX: y"', 0, bytes(16)]]),
    "an excessive payload": poll_response([[1, 1, '"a"', 1 << 62, bytes(8) + (1 << 62).to_bytes(8)]]),
    "a huge response": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (MAX_POLL_BYTES + 1),
    "an excessive response": b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 10**30,
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "short": body_response(poll_response([]), length=1000),
    "longer than its Content-Length": body_response(b"\x90\x90", length=1),
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000,
    "an error": b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("case", BAD_POLLS)
def test_a_malformed_poll_response_is_ignored_and_the_poll_repeated(pair: TransportPair, case: str) -> None:
    polls = [BAD_POLLS[case], publication(RANGES)]
    with ScriptedSender(polls, [body_response(DATA)] * 9) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        assert sender.outcome() == "written"
    assert landed(pair) == DATA
    pair.receiver.poll()
    check_rest_is_untouched(pair)


@pytest.mark.parametrize("status", [b"403 Forbidden", b"410 Gone"])
def test_a_sender_that_refuses_or_closes_is_forgotten(pair: TransportPair, status: bytes) -> None:
    receiver = pair.receiver.transport
    assert isinstance(receiver, HttpTransport)
    with ScriptedSender([b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n"]) as sender:
        receiver.connect_to_sender(sender.address)
        eventually(lambda: sender.address not in receiver._senders)
        receiver.connect_to_sender(sender.address)
        eventually(lambda: sender.polls == 2)


def test_a_sender_whose_responses_are_always_malformed_is_forgotten() -> None:
    receiver = HttpTransport(stall_timeout_s=0.1)
    buffers = MultimodalDataBuffers(SMALL, shared=False)
    receiver.register(buffers)
    with ScriptedSender([b"no\r\n\r\n"] * 100) as sender:
        receiver.connect_to_sender(sender.address)
        eventually(lambda: not receiver._senders)
        assert 2 <= sender.polls < 10, "it must be polled ever more slowly"
    receiver.close()
    buffers.close()


@pytest.mark.parametrize(
    ("ranges", "epoch"),
    [
        (RANGES, 2),
        (RANGES, 0),
        ([(0, 100), (SMALL.region_bytes - 1, 1)], 1),
        ([(0, 100), ((1 << 64) - 2, 100)], 1),
        ([(0, 0)], 1),
        ([(0, 48 * 5 + 1)], 1),
    ],
)
def test_a_write_that_no_window_covers_is_refused_and_not_fetched(
    pair: TransportPair, ranges: list[tuple[int, int]], epoch: int
) -> None:
    with ScriptedSender([publication(ranges, epoch=epoch)]) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        assert sender.outcome() == "refused"
        assert sender.ranges == [], "bytes were fetched"
    pair.expect()


# Responses to fetches

BAD_FETCHES: dict[str, Scripted] = {
    "another etag": body_response(DATA, etag='"2-feed"'),
    "a weak etag": body_response(DATA, etag='W/"1-feed"'),
    "no etag": body_response(DATA, etag=None),
    "compressed": body_response(DATA, "Content-Encoding: gzip"),
    "short": body_response(DATA[:-1]),
    "long": body_response(DATA + b"x"),
    "a huge length": body_response(DATA, length=10**17),
    "an excessive length": body_response(DATA, length=10**30),
    "a negative length": body_response(DATA, length=-1),
    "two lengths": body_response(DATA, "Content-Length: 5"),
    "no length": b"HTTP/1.1 200 OK\r\nETag: " + b'"1-feed"\r\n\r\n' + DATA,
    "chunked": b'HTTP/1.1 200 OK\r\nETag: "1-feed"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n',
    "another range": body_response(DATA, "Content-Range: bytes 1-128/129", status="206 Partial Content"),
    "a part without Content-Range": body_response(DATA, status="206 Partial Content"),
    "several ranges": body_response(
        DATA, "Content-Range: bytes 0-1/128, bytes 2-127/128", status="206 Partial Content"
    ),
    "garbage": b"\x00\xff\r\n\r\n" + DATA,
    "nothing": b"",
    "part of a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 4000,
    "not satisfiable": b"HTTP/1.1 416 No\r\nContent-Range: bytes */128\r\nContent-Length: 0\r\n\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n",
    "forbidden": b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
    "a proxy that fails": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 3\r\n\r\nbad",
    "an error with a huge body": b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 9999999999\r\n\r\n",
    "no content": b'HTTP/1.1 204 No Content\r\nETag: "1-feed"\r\n\r\n',
}


@pytest.mark.parametrize("case", BAD_FETCHES)
def test_a_wrong_response_fails_the_write(pair: TransportPair, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(remote_sender, "MAX_TRIES", 2)
    with ScriptedSender([publication(RANGES)], [BAD_FETCHES[case]] * 10) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        assert sender.outcome() == "failed"
        assert 1 <= len(sender.ranges) <= 3
    pair.receiver.poll()
    check_rest_is_untouched(pair)


GOOD_FETCHES: dict[str, list[Scripted]] = {
    "whole": [body_response(DATA)],
    "followed by another response": [body_response(DATA + b"HTTP/1.1 204 No Content\r\n\r\n", length=len(DATA))],
    "as one part": [body_response(DATA, "Content-Range: bytes 0-127/128", status="206 Partial Content")],
    "after an early hint": [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + body_response(DATA)],
    "in HTTP/1.0": [body_response(DATA).replace(b"HTTP/1.1", b"HTTP/1.0")],
    "after a proxy's error": [b"HTTP/1.1 504 Gateway Timeout\r\nContent-Length: 2\r\n\r\nno", body_response(DATA)],
    "resumed": [
        body_response(DATA[:50], length=128),
        body_response(DATA[50:60], "Content-Range: bytes 50-127/128", status="206 Partial Content", length=78),
        body_response(DATA[60:], "Content-Range: bytes 60-127/128", status="206 Partial Content"),
    ],
    "from the start, by a proxy that does not support ranges": [
        body_response(DATA[:50], length=128),
        body_response(DATA),
    ],
}


@pytest.mark.parametrize("case", GOOD_FETCHES)
def test_every_valid_response_is_accepted(pair: TransportPair, case: str) -> None:
    with ScriptedSender([publication(RANGES)], GOOD_FETCHES[case]) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        assert sender.outcome() == "written"
        if case == "resumed":
            assert sender.ranges == ["", "bytes=50-", "bytes=60-"]
    assert landed(pair) == DATA
    check_rest_is_untouched(pair)


def test_a_write_that_the_sender_has_ended_is_dropped(pair: TransportPair) -> None:
    with ScriptedSender([publication(RANGES), publication(RANGES, number=2)]) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        eventually(lambda: len(sender.requests) == 2)
        assert [method for method, _, _ in sender.requests] == ["GET", "GET"]
    pair.expect()


# Windows that close during a fetch


@pytest.mark.parametrize("how", ["revoke", "close_blocks"])
def test_no_byte_lands_after_its_window_has_closed(pair: TransportPair, how: str) -> None:
    go_on = threading.Event()

    def in_two_halves(sock: socket.socket) -> None:
        whole = body_response(DATA)
        sock.sendall(whole[:-64])
        assert go_on.wait(DEADLINE_S)
        sock.sendall(whole[-64:])

    with ScriptedSender([publication(RANGES)], [in_two_halves]) as sender:
        pair.receiver.transport.connect_to_sender(sender.address)
        eventually(lambda: bytes(pair.bytes[:64]) == DATA[:64])
        if how == "revoke":
            pair.receiver.transport.revoke(1)
            pair.receiver.revoked(1)
        else:
            pair.receiver.transport.close_blocks(1, (0,))
        pair.bytes[:] = CANARY
        go_on.set()
        assert sender.outcome() == "refused"
    pair.expect()


# Broken connections


def test_a_body_that_is_cut_repeatedly_resumes_at_the_byte() -> None:
    """The payload crosses once, beside the heads of the further requests."""
    limit, times = 5_000_000, 5
    with ChaosProxy(cut_after=limit, times=times) as proxy:
        pair = TransportPair(lambda wake: HttpTransport(wake, advertise=f"http://127.0.0.1:{proxy.port}"), LARGE)
        assert isinstance(pair.sender.transport, HttpTransport)
        assert pair.sender.transport._server is not None
        proxy.upstream = pair.sender.transport._server.listener.port
        blocks = tuple(range(64))
        pair.admit(1, blocks)
        pieces = pair.fill(blocks)
        assert pair.write(1, blocks, pieces) is None
        pair.expect(pieces)
        assert proxy.cuts == times
        payload = sum(piece.source.nbytes for piece in pieces)
        assert payload < sum(proxy.to_clients) < payload + 4096
        pair.close()


def test_a_sender_that_vanishes_is_forgotten_and_nothing_leaks() -> None:
    def remains() -> tuple[int, set[threading.Thread]]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), set(threading.enumerate())

    before = remains()
    receiver = HttpTransport(stall_timeout_s=0.2)
    buffers = MultimodalDataBuffers(SMALL, shared=False)
    receiver.register(buffers)
    receiver.admit(Window(1, (0,)))
    with ScriptedSender([publication(RANGES)], [body_response(DATA[:50], length=128)]) as sender:
        receiver.connect_to_sender(sender.address)
        eventually(lambda: len(sender.ranges) >= 1)
    eventually(lambda: not receiver._senders)
    receiver.close()
    buffers.close()
    assert remains() == before


def test_a_poll_that_breaks_after_a_long_wait_is_repeated() -> None:
    """The time that a pending poll waited does not count towards giving up: a proxy's idle time-out may be short."""
    receiver = HttpTransport(stall_timeout_s=0.2)
    buffers = MultimodalDataBuffers(SMALL, shared=False)
    receiver.register(buffers)
    receiver.admit(Window(1, (0,)))

    def broken_late(_: socket.socket) -> None:
        threading.Event().wait(0.6)

    with ScriptedSender([broken_late, publication(RANGES)], [body_response(DATA)] * 9) as sender:
        receiver.connect_to_sender(sender.address)
        assert sender.outcome() == "written"
    receiver.close()
    buffers.close()


def test_closing_does_not_wait_for_a_silent_sender() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = HttpAddress(f"http://127.0.0.1:{listener.getsockname()[1]}", bytes(16))
        end = Endpoint(HttpTransport)
        buffers = MultimodalDataBuffers(SMALL, shared=False)
        end.transport.register(buffers)
        end.transport.connect_to_sender(msgspec.msgpack.encode(address))
        listener.accept()[0].close()
        closing = threading.Thread(target=end.transport.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()
        buffers.close()
