"""Positions to which a demuxer seeks: whole, cut and odd files pass, and those that lead beyond 31 bits are refused."""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Callable

import pytest

from embferry.serve.media.formats import sniff
from embferry.serve.media.headers import positions
from embferry.serve.media.headers.claims import ClaimError
from tests.serve.films import film
from tests.serve.test_media_headers import EBML, SEGMENT, asf_object, box, chunk, element, table

FAR = 0xC000_0000
HEAD = box(b"ftyp", b"isom", bytes(4))


def moov(*boxes: bytes) -> bytes:
    content = b"".join(boxes)
    for name in (b"stbl", b"minf", b"mdia", b"trak", b"moov"):
        content = box(name, content)
    return HEAD + content


def fragment(header: bytes, run: bytes) -> bytes:
    return HEAD + box(b"moof", box(b"traf", box(b"tfhd", header), box(b"trun", run)))


def avi(*chunks: bytes) -> bytes:
    body = b"AVI " + b"".join(chunks)
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def odml(kind: int, entries: bytes, base: int = 0) -> bytes:
    return chunk(b"indx", struct.pack("<HBBI4sQ4x", 4, 0, kind, 1, b"00dc", base) + entries)


def segment(*elements: bytes) -> bytes:
    return element(b"\x1a\x45\xdf\xa3", b"") + element(b"\x18\x53\x80\x67", b"".join(elements))


LEADING: dict[str, tuple[str, bytes]] = {
    "MP4: a box": ("mov", HEAD + struct.pack(">I4s", FAR, b"free")),
    "MP4: a box of 64 bits": ("mov", HEAD + struct.pack(">I4sQ", 1, b"mdat", 1 << 40)),
    "MP4: a chunk of samples": ("mov", moov(table(b"stco", 1, FAR))),
    "MP4: a chunk of samples, 64 bits": ("mov", moov(table(b"co64", 1, entries=struct.pack(">Q", 1 << 40)))),
    "MP4: a description": ("mov", moov(table(b"stsd", 1, FAR, entries=b"avc1"))),
    "MP4: a reference": ("mov", moov(table(b"dref", 1, FAR, entries=b"url "))),
    "MP4: a fragment": ("mov", fragment(struct.pack(">IIQ", 1, 1, 1 << 40), struct.pack(">II", 0, 0))),
    "MP4: a run": ("mov", fragment(bytes(8), struct.pack(">IIi", 1, 0, -2000))),
    "MP4: samples of a run": ("mov", fragment(bytes(8), struct.pack(">IIII", 0x200, 2, 0x7000_0000, 0x7000_0000))),
    "MP4: samples of one length": ("mov", fragment(struct.pack(">III", 0x10, 1, FAR), struct.pack(">II", 0, 1))),
    "MP4: segments": ("mov", HEAD + table(b"sidx", 1, 1, 0, FAR, 0)),
    "MP4: lengths of segments": ("mov", HEAD + table(b"sidx", 1, 1, 0, 0, 2, *(0x7000_0000, 0, 0) * 2)),
    "AVI: a chunk": ("avi", avi(struct.pack("<4sI", b"JUNK", FAR))),
    "AVI: the frames": ("avi", avi(struct.pack("<4sI4s", b"LIST", FAR, b"movi"))),
    "AVI: a header that is too short": ("avi", avi(chunk(b"LIST", b"hdrl" + chunk(b"avih", bytes(12))))),
    "AVI: an index": ("avi", avi(chunk(b"idx1", struct.pack("<4sIII", b"00dc", 16, FAR, 8)))),
    "AVI: an index of indexes": ("avi", avi(odml(0, struct.pack("<QII", 1 << 40, 8, 0)))),
    "AVI: an index of frames": ("avi", avi(odml(1, struct.pack("<II", 8, 8), base=1 << 40))),
    "Matroska: an element": ("matroska", EBML + SEGMENT + b"\xec" + ((1 << 56) + (1 << 40)).to_bytes(8)),
    "Matroska: a list of parts": ("matroska", segment(element(b"\x11\x4d\x9b\x74", element(b"\x4d\xbb", element(
        b"\x53\xac", FAR.to_bytes(8)))))),
    "Matroska: the index": ("matroska", segment(element(b"\x1c\x53\xbb\x6b", element(b"\xbb", element(b"\xb7", element(
        b"\xf1", FAR.to_bytes(4))))))),
    "ASF: an object": ("asf", asf_object(bytes(16), b"", FAR)),
}  # fmt: skip


@pytest.mark.parametrize("name", LEADING)
def test_a_position_of_more_than_31_bits_is_refused(name: str) -> None:
    reader, data = LEADING[name]
    with pytest.raises(ClaimError):
        positions.check(data, reader)


FILMS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: film("mp4"),
    "mov": lambda: film("mov", "mjpeg"),
    "mp4 in fragments": lambda: film("mp4", muxer={"movflags": "frag_keyframe+empty_moov"}),
    "mp4 with an index of segments": lambda: film("mp4", muxer={"movflags": "dash+frag_keyframe"}),
    "avi": lambda: film("avi", "mpeg4"),
    "matroska": lambda: film("matroska"),
    "webm": lambda: film("webm", "libvpx"),
    "asf": lambda: film("asf", "wmv2"),
}


@pytest.mark.parametrize("name", FILMS)
def test_whole_and_cut_files_pass(name: str) -> None:
    data = FILMS[name]()
    reader = sniff(data, "video").reader
    for end in (*range(64, len(data), max(1, len(data) // 50)), len(data)):
        positions.check(data[:end], reader)


@pytest.mark.parametrize("name", FILMS)
def test_any_bytes_pass_or_are_refused(name: str) -> None:
    data, chance = FILMS[name](), random.Random(name)
    reader = sniff(data, "video").reader
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(chance.randrange(1, 5)):
            changed[chance.randrange(len(changed))] = chance.choice((0, 0x7F, 0xFF))
        with contextlib.suppress(ClaimError):
            positions.check(bytes(changed), reader)


def test_the_number_of_parts_is_bounded() -> None:
    with pytest.raises(ClaimError, match="too many parts"):
        positions.check(HEAD + box(b"free") * (positions.MAX_PARTS + 1), "mov")
    nested = b""
    for _ in range(positions.MAX_DEPTH + 2):
        nested = box(b"moov", nested)
    with pytest.raises(ClaimError, match="nested too deep"):
        positions.check(nested, "mov")
