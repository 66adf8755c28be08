"""The parts that the transports share: windows, the loop thread, the outbox, cursors and permits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.errors import LocalProtocolError
from embferry.testing.pair import LARGE, TransportPair
from embferry.transports.contract import Event, Revoked, Transport, Window
from embferry.transports.http import HttpTransport
from embferry.transports.net.connections import Link, LinkedTransport
from embferry.transports.net.cursor import CALL_BYTES, IOV_MAX, Cursor
from embferry.transports.net.loop import READ, LoopThread
from embferry.transports.outbox import Outbox
from embferry.transports.receive_region import Permit, ReceiveRegion
from embferry.transports.tcp import TcpTransport
from embferry.transports.windows import MAX_RANGES, BlockRows, Windows, as_ranges

ROWS = BlockRows(((0, 10), (64, 4), (128, 7)), num_blocks=5)


@given(st.lists(st.tuples(st.integers(0, 180), st.integers(0, 60)), max_size=5))
def test_touched_blocks_are_the_blocks_of_every_byte(ranges: list[tuple[int, int]]) -> None:
    def block_of(byte: int) -> tuple[int, int] | None:
        for field, (base, size) in enumerate(((0, 10), (64, 4), (128, 7))):
            if base <= byte < base + 5 * size:
                return field, (byte - base) // size
        return None

    places = [[block_of(b) for b in range(offset, offset + length)] for offset, length in ranges]
    inside = all(None not in p and len({f for f, _ in filter(None, p)}) <= 1 for p in places)
    touched = ROWS.touched(as_ranges(ranges))
    many = ROWS.touched(as_ranges(ranges * 17))  # many ranges take another path of the code
    assert (touched is None) == (many is None) or not ranges
    assert touched is None or many is None or touched.tolist() == many.tolist()
    if inside and all(offset <= ROWS.end for offset, _ in ranges):
        assert touched is not None
        assert touched.tolist() == sorted({block for p in places for _, block in filter(None, p)})
    else:
        assert touched is None


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=4))
def test_sums_of_huge_numbers_do_not_overflow(ranges: list[tuple[int, int]]) -> None:
    fits = all(offset + length <= ROWS.end for offset, length in ranges)
    assert fits or ROWS.touched(as_ranges(ranges)) is None


def test_an_exception_on_the_loop_thread_is_raised_by_drain() -> None:
    woken = threading.Event()
    outbox = Outbox(woken.set)
    loop = LoopThread("embferry-test", outbox.fail)
    loop.call(lambda: [][1])
    assert woken.wait(10)
    with pytest.raises(LocalProtocolError, match="IndexError"):
        outbox.drain()
    loop.close()


def test_calls_run_once_and_in_order_until_the_loop_is_closed() -> None:
    loop = LoopThread("embferry-test", lambda error: None)
    order: list[int] = []
    for number in range(100):
        loop.call(lambda number=number: order.append(number))  # type: ignore[misc]  # mypy cannot type the default
    loop.close()
    loop.call(lambda: order.append(100))
    loop.close()
    assert order == list(range(101))


def test_a_watched_descriptor_calls_back_and_timers_run_in_order() -> None:
    loop = LoopThread("embferry-test", lambda error: None)
    seen: list[str] = []
    done = threading.Event()
    reader, writer = os.pipe()

    def readable(_: int) -> None:
        seen.append(os.read(reader, 1).decode())
        loop.unwatch(reader)
        loop.unwatch(reader)
        loop.later(0.02, done.set)
        loop.later(0.01, lambda: seen.append("first"))

    loop.call(lambda: loop.watch(reader, READ, readable))
    os.write(writer, b"x")
    assert done.wait(60)
    loop.close()
    os.close(reader)
    os.close(writer)
    assert seen == ["x", "first"]


def test_an_outbox_keeps_the_order_and_calls_wake_after_each_post() -> None:
    wakes: list[int] = []
    outbox = Outbox(lambda: wakes.append(1))
    events: list[Event] = [Revoked(epoch) for epoch in range(5)]
    for event in events:
        outbox.post(event)
    assert outbox.drain() == events
    assert outbox.drain() == []
    assert len(wakes) == 5


@pytest.mark.integration
def test_a_program_that_does_not_close_its_transports_ends() -> None:
    program = """
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.transports.http import HttpTransport
from embferry.transports.shm import ShmTransport
from embferry.transports.tcp import TcpTransport
from embferry.testing.pair import SMALL

for kind in (ShmTransport, TcpTransport, HttpTransport):
    receiver, sender = kind(), kind()
    sender.connect(receiver.register(MultimodalDataBuffers(SMALL, shared=True)))
    receiver.connect_to_sender(sender.address)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


SOCKETS = pytest.mark.parametrize("kind", [TcpTransport, HttpTransport])


@pytest.mark.integration
@SOCKETS
@pytest.mark.parametrize("open_window", [True, False])
def test_memory_does_not_grow_with_the_payload(kind: type[Transport], open_window: bool) -> None:
    large = TransportPair(kind, LARGE)
    blocks = tuple(range(64))
    pieces = large.fill(blocks)
    large.admit(1, blocks if open_window else (0,))
    tracemalloc.start()
    try:
        error = large.write(1, blocks, pieces)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        large.close()
    assert (error is None) == open_window
    assert peak < 1 << 20, f"{peak} bytes allocated at most for a payload of {LARGE.region_bytes}"


@pytest.mark.integration
@SOCKETS
def test_a_receive_under_way_delays_revocation(kind: type[LinkedTransport[ReceiveRegion, Link]]) -> None:
    pair = TransportPair(kind)
    transport = pair.receiver.transport
    assert isinstance(transport, kind)
    assert transport._receiving is not None
    pair.admit(1, (0,))
    revoking = threading.Thread(target=transport.revoke, args=(1,))
    with transport._receiving.lock:  # as the receiving thread holds it inside recvmsg_into
        revoking.start()
        revoking.join(0.1)
        assert revoking.is_alive()
        assert transport.poll() == []
    revoking.join()
    assert transport.poll() == [Revoked(1)]
    pair.close()


@pytest.mark.integration
@SOCKETS
def test_writes_with_too_many_or_no_pieces_are_refused(kind: type[Transport]) -> None:
    pair = TransportPair(kind)
    pair.admit(1, (0,))
    pair.expect_refused(pair.write(1, (0,), [pair.fill((0,))[0]] * (MAX_RANGES + 1)))
    pair.expect_refused(pair.write(1, (0,), []))
    pair.close()


def test_a_cursor_advances_across_buffers_and_skips_empty_ones() -> None:
    cursor = Cursor([memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")])
    taken = b""
    while cursor.left:
        data = b"".join(cursor.views())
        taken += data[:2]
        cursor.advance(min(2, len(data)))
    assert taken == b"abcdefgh"
    big = Cursor([memoryview(bytes(CALL_BYTES)), memoryview(b"x")] + [memoryview(b"y")] * 2000)
    assert sum(view.nbytes for view in big.views()) <= CALL_BYTES
    big.advance(CALL_BYTES)
    assert len(big.views()) <= IOV_MAX
    assert np.sum([view.nbytes for view in big.views()]) == IOV_MAX


def test_a_cursor_can_be_limited_to_a_range_of_bytes() -> None:
    parts = [memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")]
    for start in range(9):
        for stop in (None, *range(start, 9)):
            assert b"".join(Cursor(parts, start, stop).views()) == b"abcdefgh"[start:stop]


def test_a_permit_detects_a_window_that_closes_during_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that closes directly after the check must be detected by the next check."""
    windows = Windows(ROWS, np.zeros(5, np.uint64))
    windows.admit(Window(1, (2,)))
    permit = Permit(windows, 1, np.array([2]))
    allows = windows.allows
    checks: list[bool] = []

    def check_and_close(epoch: int, touched: npt.NDArray[np.intp]) -> bool:
        checks.append(allows(epoch, touched))
        windows.close_blocks(1, (2,))
        return checks[-1]

    monkeypatch.setattr(windows, "allows", check_and_close)
    assert [permit.holds(), permit.holds(), permit.holds()] == [True, False, False]
    assert checks == [True, False], "once refused, it stays refused without a check"
    assert not Permit(windows, 1, None).holds()
