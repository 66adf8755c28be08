"""Frames survive any split of the stream; a damaged one is never delivered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.errors import RemoteProtocolError, VersionMismatch
from embferry.transfer.control import handshake
from embferry.transfer.control.framing import HEADER, FrameReader, frame, header
from embferry.transfer.control.handshake import Handshake
from embferry.transfer.control.outgoing import Budget, Outgoing

PAYLOADS = [b"a", bytes(40), b"the last one"]
STREAM = b"".join(map(frame, PAYLOADS))


def test_every_split_into_two_gives_the_same_frames() -> None:
    for at in range(len(STREAM) + 1):
        reader = FrameReader(100)
        assert [*reader.feed(STREAM[:at]), *reader.feed(STREAM[at:])] == PAYLOADS
        assert reader.held == 0


def test_single_bytes_give_the_same_frames() -> None:
    reader = FrameReader(100)
    assert [payload for byte in STREAM for payload in reader.feed(bytes([byte]))] == PAYLOADS


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=6), st.lists(st.integers(1, 60), max_size=40))
def test_any_split_gives_the_same_frames(payloads: list[bytes], sizes: list[int]) -> None:
    stream, reader, got = b"".join(map(frame, payloads)), FrameReader(50), []
    for size in [*sizes, len(stream)]:
        got += reader.feed(stream[:size])
        stream = stream[size:]
        assert reader.held < HEADER.size + 50
    assert got == payloads


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_anywhere_is_never_delivered(bit: int) -> None:
    """The damaged frame ends the connection, and the frame before it is delivered. It is not waited for."""
    for position in range(len(STREAM) - len(frame(PAYLOADS[0]))):
        position += len(frame(PAYLOADS[0]))
        damaged = bytearray(STREAM)
        damaged[position] ^= 1 << bit
        got: list[bytes] = []
        reader = FrameReader(1 << 20)
        with pytest.raises(RemoteProtocolError):
            got.extend(reader.feed(bytes(damaged)))
        assert reader.held == 0
        assert got == PAYLOADS[: len(got)]
        assert len(got) < len(PAYLOADS)


def test_a_long_length_is_refused_before_its_bytes_come() -> None:
    reader = FrameReader(100)
    with pytest.raises(RemoteProtocolError):
        list(reader.feed(header(101, 0) + bytes(50)))
    assert reader.held == 0


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(RemoteProtocolError):
        list(FrameReader(100).feed(frame(b"")))


def test_handshakes_agree_on_the_newest_common_version(monkeypatch: pytest.MonkeyPatch) -> None:
    newer = handshake._HELLO.pack(handshake.MAGIC, 1, 7) + b"appended by a later version"
    ours = Handshake()
    ours.receive(newer)
    assert (ours.done, ours.version) == (True, 1)


@pytest.mark.parametrize(
    ("hello", "error"),
    [
        (handshake._HELLO.pack(handshake.MAGIC, 2, 7), VersionMismatch),
        (b"GET / HTTP/1.1\r\n", RemoteProtocolError),
        (handshake.MAGIC, RemoteProtocolError),
    ],
)
def test_other_hellos_are_refused(hello: bytes, error: type[Exception]) -> None:
    ours = Handshake()
    with pytest.raises(error):
        ours.receive(hello)
    assert not ours.done


def test_a_queue_is_bounded_alone_and_with_others() -> None:
    budget = Budget(100)
    one, two = Outgoing(60, budget), Outgoing(60, budget)
    assert one.add(bytes(60))
    assert not one.add(b"x")
    assert two.add(bytes(40))
    assert not two.add(b"x")
    one.advance(10)
    assert two.add(bytes(10))
    assert (one.clear(), two.clear(), budget.used) == (1, 2, 0)


@given(st.lists(st.binary(min_size=1, max_size=9), max_size=200), st.lists(st.integers(1, 30), min_size=1))
def test_a_queue_gives_its_bytes_in_order(frames: list[bytes], steps: list[int]) -> None:
    budget = Budget(1 << 20)
    queue, sent, at = Outgoing(1 << 20, budget), b"", 0
    for one in frames:
        queue.add(one)
    while queue:
        data = b"".join(queue.buffers())[: steps[at % len(steps)]]
        sent += data
        queue.advance(len(data))
        at += 1
    assert sent == b"".join(frames)
    assert (queue.bytes, budget.used) == (0, 0)


def test_a_queue_begins_a_cut_frame_again() -> None:
    queue = Outgoing(100, Budget(100))
    queue.add(b"first")
    queue.add(b"second")
    queue.advance(7)
    assert b"".join(queue.buffers()) == b"cond"
    queue.rewind()
    assert b"".join(queue.buffers()) == b"second"
    assert queue.bytes == 6
