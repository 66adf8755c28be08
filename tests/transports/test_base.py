"""What all transports stand on: the table of windows, the background thread, the outbox."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.protocol.errors import LocalProtocolError
from embferry.transports.contract import Event, Revoked, Window
from embferry.transports.net.cursor import CALL_BYTES, IOV_MAX, Cursor
from embferry.transports.net.loop import READ, Loop
from embferry.transports.outbox import Outbox
from embferry.transports.receive_region import Permit
from embferry.transports.windows import BlockRows, Windows, as_ranges

ROWS = BlockRows(((0, 10), (64, 4), (128, 7)), num_blocks=5)


@given(st.lists(st.tuples(st.integers(0, 180), st.integers(0, 60)), max_size=5))
def test_touched_blocks_are_those_of_every_byte(ranges: list[tuple[int, int]]) -> None:
    def block_of(byte: int) -> tuple[int, int] | None:
        for field, (base, size) in enumerate(((0, 10), (64, 4), (128, 7))):
            if base <= byte < base + 5 * size:
                return field, (byte - base) // size
        return None

    places = [[block_of(b) for b in range(offset, offset + length)] for offset, length in ranges]
    inside = all(None not in p and len({f for f, _ in filter(None, p)}) <= 1 for p in places)
    touched = ROWS.touched(as_ranges(ranges))
    many = ROWS.touched(as_ranges(ranges * 17))  # which takes another way
    assert (touched is None) == (many is None) or not ranges
    assert touched is None or many is None or touched.tolist() == many.tolist()
    if inside and all(offset <= ROWS.end for offset, _ in ranges):
        assert touched is not None
        assert touched.tolist() == sorted({block for p in places for _, block in filter(None, p)})
    else:
        assert touched is None


@given(st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 64) - 1)), min_size=1, max_size=4))
def test_huge_numbers_do_not_wrap(ranges: list[tuple[int, int]]) -> None:
    fits = all(offset + length <= ROWS.end for offset, length in ranges)
    assert fits or ROWS.touched(as_ranges(ranges)) is None


def test_a_bug_on_the_background_thread_reaches_the_driver() -> None:
    woken = threading.Event()
    outbox = Outbox(woken.set)
    loop = Loop("embferry-test", outbox.fail)
    loop.call(lambda: [][1])
    assert woken.wait(10)
    with pytest.raises(LocalProtocolError, match="IndexError"):
        outbox.drain()
    loop.close()


def test_calls_are_never_lost_and_keep_their_order() -> None:
    loop = Loop("embferry-test", lambda error: None)
    order: list[int] = []
    for number in range(100):
        loop.call(lambda number=number: order.append(number))  # type: ignore[misc]  # mypy cannot type the default
    loop.close()
    loop.call(lambda: order.append(100))
    loop.close()
    assert order == list(range(101))


def test_timers_and_descriptors() -> None:
    loop = Loop("embferry-test", lambda error: None)
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
    assert done.wait(10)
    loop.close()
    os.close(reader)
    os.close(writer)
    assert seen == ["x", "first"]


def test_an_outbox_keeps_order_and_wakes_each_time() -> None:
    wakes: list[int] = []
    outbox = Outbox(lambda: wakes.append(1))
    events: list[Event] = [Revoked(epoch) for epoch in range(5)]
    for event in events:
        outbox.post(event)
    assert outbox.drain() == events
    assert outbox.drain() == []
    assert len(wakes) == 5


@pytest.mark.integration
def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    program = """
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.transports.shm import ShmTransport
from embferry.transports.tcp import TcpTransport
from embferry.testing.pair import SMALL

for receiver, sender in ((ShmTransport(), ShmTransport()), (TcpTransport(), TcpTransport())):
    sender.connect(receiver.register(MultimodalDataBuffers(SMALL, shared=True)))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_a_cursor_moves_over_parts_and_empty_buffers() -> None:
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


def test_a_cursor_over_a_part_of_the_bytes() -> None:
    parts = [memoryview(b"abc"), memoryview(b""), memoryview(b"defgh")]
    for start in range(9):
        for stop in (None, *range(start, 9)):
            assert b"".join(Cursor(parts, start, stop).views()) == b"abcdefgh"[start:stop]


def test_a_permit_sees_what_closes_while_it_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that closes right behind the look must be seen by the next one."""
    windows = Windows(ROWS, np.zeros(5, np.uint64))
    windows.admit(Window(1, (2,)))
    permit = Permit(windows, 1, np.array([2]))
    look = windows.allows
    looks: list[bool] = []

    def close_behind(epoch: int, touched: npt.NDArray[np.intp]) -> bool:
        looks.append(look(epoch, touched))
        windows.close_blocks(1, (2,))
        return looks[-1]

    monkeypatch.setattr(windows, "allows", close_behind)
    assert [permit.holds(), permit.holds(), permit.holds()] == [True, False, False]
    assert looks == [True, False], "once refused, it stays so without a look"
    assert not Permit(windows, 1, None).holds()
