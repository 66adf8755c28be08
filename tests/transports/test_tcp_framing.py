"""The frames of the tcp transport: a flipped bit is noticed, wherever it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from embferry.transports.tcp import framing
from embferry.transports.tcp.framing import FrameError
from embferry.transports.windows import as_ranges

HEAD = framing.head(7, 3, as_ranges([(0, 64), (4096, 100)]))
RESERVED = range(6, 8)
"""Bytes of a head that mean nothing."""


def flipped(frame: bytes) -> Iterator[tuple[int, bytes]]:
    for at in range(len(frame)):
        for bit in range(8):
            yield at, frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :]


def parsed_head(frame: bytes) -> framing.Head:
    head = framing.parse_head(frame[: framing.HEAD.size])
    head.verify(frame[framing.HEAD.size :])
    return head


def test_a_flipped_bit_in_the_head_of_a_write_is_noticed() -> None:
    assert parsed_head(HEAD).payload == 164
    for at, damaged in flipped(HEAD):
        if at in RESERVED:
            assert parsed_head(damaged) == parsed_head(HEAD)
        else:
            with pytest.raises(FrameError):
                parsed_head(damaged)


@pytest.mark.parametrize(
    "frame",
    [
        framing.verdict_frame(3, framing.WRITTEN),
        framing.verdict_frame(3, framing.REFUSED),
        framing.progress_frame(1 << 20),
    ],
)
def test_a_flipped_bit_in_an_answer_is_noticed(frame: bytes) -> None:
    framing.parse_verdict(frame)
    for _, damaged in flipped(frame):
        with pytest.raises(FrameError):
            framing.parse_verdict(damaged)


def test_a_flipped_bit_in_a_hello_is_noticed() -> None:
    for at, damaged in flipped(framing.hello(bytes(16))):
        try:
            assert framing.parse_hello(damaged) != bytes(16) or at in RESERVED
        except FrameError:
            continue
