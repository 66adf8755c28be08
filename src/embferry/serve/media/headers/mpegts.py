"""MPEG transport streams (ISO/IEC 13818-1, 2.4): the types of the streams, for a codec that FFmpeg has no name for."""

from __future__ import annotations

from collections.abc import Iterator

PACKETS = 20_000
"""Packets that are looked at. The tables come ten times a second."""
_LENGTHS = ((188, 0), (192, 4), (204, 0))
"""Bytes of a packet, and those before the first."""
_PROGRAMS, _STREAMS = 0, 2
"""Identifiers of the tables."""


def codec(data: bytes) -> str:
    """Returns the types of the streams of the first program, as numbers; empty if its table is not found."""
    programs: set[int] = set()
    for packet, section in _sections(data):
        if packet == 0 and section[0] == _PROGRAMS:
            for at in range(8, len(section) - 3, 4):
                if any(section[at : at + 2]):
                    programs.add(_thirteen_bits(section, at + 2))
        elif packet in programs and section[0] == _STREAMS:
            return "stream type " + ", ".join(f"0x{kind:02x}" for kind in _types(section))
    return ""


def _types(section: bytes) -> Iterator[int]:
    at = 12 + (_thirteen_bits(section, 10) & 0xFFF) if len(section) >= 12 else len(section)
    while at + 5 <= len(section):
        yield section[at]
        at += 5 + (_thirteen_bits(section, at + 3) & 0xFFF)


def _sections(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields the number of the stream and the content of each table that begins in a packet, as far as that holds it.

    Each has a byte or more, and no checksum.
    """
    length, at = next((one for one in _LENGTHS if data[one[1] : 3 * one[0] : one[0]] == b"GGG"), _LENGTHS[0])
    for start in range(at, min(len(data), PACKETS * length), length):
        packet = data[start : start + 188]
        if len(packet) < 188 or not packet[1] & 0x40 or not packet[3] & 0x10:
            continue
        begin = 5 + packet[4] if packet[3] & 0x20 else 4
        begin += 1 + packet[begin] if begin < 188 else 0
        if begin + 3 > 188:
            continue
        end = begin + 3 + (_thirteen_bits(packet, begin + 1) & 0xFFF) - 4
        if section := packet[begin:end]:
            yield _thirteen_bits(packet, 1), section


def _thirteen_bits(data: bytes, at: int) -> int:
    return (data[at] & 0x1F) << 8 | data[at + 1]
