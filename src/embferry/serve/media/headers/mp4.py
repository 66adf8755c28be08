"""MP4 and QuickTime files: the tables of samples (ISO/IEC 14496-12) must fit into the file.

FFmpeg makes an entry of its index for each sample that a table claims, and for each again that an edit list shows. A
table may claim samples of one size without listing them, so its length alone bounds nothing.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from dataclasses import dataclass

from embferry.serve.media.headers.claims import ClaimError

MAX_BOXES = 100_000
"""Boxes of a small file."""
BOX_BYTES = 12
"""Bytes of the file for each further one. A fragment of one frame has seven boxes and at least 100 bytes."""
MAX_DEPTH = 16
MAX_TRACKS = 64
MAX_REPEATS = 4
"""How often the samples that are listed may take the bytes of the file."""
SLACK = 1 << 20
"""Samples that edit lists may show in total, beside one for each byte of the file."""

_NAMES = b"""moov trak mdia minf stbl edts dinf tref udta moof traf mvex sinf schi wave meta ilst gmhd iprp ipco clip
tapt mfra wide rmra rmda strk strd grpl hnti hinf"""
_CONTAINERS = frozenset(_NAMES.split())
"""Boxes that hold boxes, wherever they stand: the decoder descends into them at any place."""
_ENTRY_BYTES = {b"stco": 4, b"co64": 8, b"stsc": 12, b"stts": 8, b"ctts": 8, b"stss": 4, b"stps": 4}
"""Tables of entries of fixed length, after version, flags and a count."""
_REFUSED = {b"cmov": "its index is compressed", b"iloc": "it is a collection of pictures"}
_CODEC = re.compile(rb"hdlr.{8}vide.{0,4096}?stsd.{12}(.{4})", re.DOTALL)
"""The kind of a track, and the code of its first description of samples."""
_HIDDEN = re.compile(rb"trak|stsz|stz2|stco|co64|stsc|stts|ctts|elst|trun|cmov")
"""Names that have no business within the description of samples, into which the decoder descends too."""


@dataclass(slots=True)
class _Totals:
    """The claims of all tables together. ``in_track`` and ``edits`` are those of the last track.

    ``is_cut``: a box reaches beyond the end of the file.
    """

    size: int
    boxes: int = 0
    tracks: int = 0
    bytes_of_samples: int = 0
    samples: int = 0
    shown: int = 0
    in_track: int = 0
    edits: int = 0
    is_cut: bool = False

    def close_track(self) -> None:
        self.shown += self.in_track * max(1, self.edits)
        self.in_track = self.edits = 0

    def add_samples(self, count: int, nbytes: int = 0) -> None:
        """Counts samples, of which each should have a byte, and the bytes that they are said to have together."""
        self.in_track += count
        self.samples += count
        self.bytes_of_samples += nbytes
        if self.samples > self.size:
            raise ClaimError(f"its index claims {self.samples:,} samples, more than its {self.size:,} bytes can hold")
        if self.bytes_of_samples > MAX_REPEATS * self.size:
            why = f"its index claims samples of {self.bytes_of_samples:,} bytes, and the file has {self.size:,}"
            raise ClaimError(why, truncated=True)


def check(data: bytes) -> None:
    """Checks the claims of an MP4 or QuickTime file.

    Raises:
        ClaimError: they exceed the file, or the file has more boxes or tracks than is read.
    """
    totals = _Totals(len(data))
    try:
        _boxes(memoryview(data), 0, len(data), 0, totals)
    except ClaimError as error:
        error.truncated |= totals.is_cut
        raise
    totals.close_track()
    if totals.shown > len(data) + SLACK:
        raise ClaimError(f"its edit lists show {totals.shown:,} samples, which is too many for {len(data):,} bytes")


def codec(data: bytes) -> str:
    """Returns the four characters that name the codec of the first picture track; empty if there is none."""
    found = _CODEC.search(data)
    return found[1].decode("latin-1").strip() if found else ""


def _boxes(data: memoryview, at: int, end: int, depth: int, totals: _Totals) -> None:
    """Reads the boxes from ``at`` to ``end``. A box that reaches beyond ``end`` is read up to there."""
    if depth > MAX_DEPTH:
        raise ClaimError(f"its boxes are nested more than {MAX_DEPTH} deep")
    while at + 8 <= end:
        totals.boxes += 1
        if totals.boxes > MAX_BOXES + totals.size // BOX_BYTES:
            raise ClaimError(f"it has more than {totals.boxes - 1:,} boxes in {totals.size:,} bytes")
        size, head = int.from_bytes(data[at : at + 4]), 8
        name = bytes(data[at + 4 : at + 8])
        if size == 1 and at + 16 <= end:
            size, head = int.from_bytes(data[at + 8 : at + 16]), 16
        if size == 0:
            size = end - at
        if size < head:
            return  # the decoder stops here too
        totals.is_cut |= at + size > len(data)
        _box(name, data, at + head, min(at + size, end), depth, totals)
        at += size


def _box(name: bytes, data: memoryview, at: int, end: int, depth: int, totals: _Totals) -> None:
    if name in _REFUSED:
        raise ClaimError(f"{_REFUSED[name]}, which is not supported")
    if name in _CONTAINERS:
        if name == b"trak":
            totals.close_track()
            totals.tracks += 1
            if totals.tracks > MAX_TRACKS:
                raise ClaimError(f"it has more than {MAX_TRACKS} tracks")
        _boxes(data, _first_box(name, data, at, end), end, depth + 1, totals)
    elif name == b"stsd":
        if hidden := _HIDDEN.search(data[at:end]):
            raise ClaimError(f"its description of samples holds a box {hidden[0].decode()}")
    elif name in _TABLES:
        _TABLES[name](name, data[at:end], totals)


def _first_box(name: bytes, data: memoryview, at: int, end: int) -> int:
    """Returns where the boxes of a container begin. ``meta`` has a version before them in MP4 only."""
    if name == b"meta" and bytes(data[at + 8 : at + 12]) == b"hdlr" and at + 12 <= end:
        return at + 4
    return at


def _count(name: bytes, body: memoryview, entry_bytes: int, at: int = 4) -> int:
    """Returns the number of entries of a table, which it must hold."""
    if len(body) < at + 4:
        return 0  # cut off: the decoder says so
    count = int.from_bytes(body[at : at + 4])
    if count * entry_bytes > len(body) - at - 4:
        raise ClaimError(f"its table {name.decode()} claims {count:,} entries and has {len(body):,} bytes")
    return count


def _table(name: bytes, body: memoryview, totals: _Totals) -> None:
    _count(name, body, _ENTRY_BYTES[name])


def _sizes(name: bytes, body: memoryview, totals: _Totals) -> None:
    """The sizes of the samples of a track, listed or one for all."""
    if len(body) < 12:
        return
    if any(body[4:8]):
        count = int.from_bytes(body[8:12])
        totals.add_samples(count)
        return
    count = _count(name, body, 4, 8)
    sizes = array("I", bytes(body[12 : 12 + 4 * count]))
    if sys.byteorder == "little":
        sizes.byteswap()
    totals.add_samples(count, sum(sizes))


def _compact_sizes(name: bytes, body: memoryview, totals: _Totals) -> None:
    if len(body) < 12:
        return
    count, bits = int.from_bytes(body[8:12]), body[7]
    if bits not in (4, 8, 16) or count * bits > 8 * (len(body) - 12):
        raise ClaimError(f"its table stz2 claims {count:,} entries and has {len(body):,} bytes")
    totals.add_samples(count)


def _edits(name: bytes, body: memoryview, totals: _Totals) -> None:
    totals.edits += _count(name, body, 20 if len(body) and body[0] == 1 else 12)


def _fragment(name: bytes, body: memoryview, totals: _Totals) -> None:
    """The samples of a fragment: a table whose entries may have no bytes at all."""
    if len(body) < 8:
        return
    flags, count = struct.unpack_from(">II", body)
    fields = (flags & 0xF00).bit_count()
    optional = 4 * (flags & 0x5).bit_count()
    if count * 4 * fields > len(body) - 8 - optional:
        raise ClaimError(f"its table trun claims {count:,} entries and has {len(body):,} bytes")
    totals.add_samples(count)


_TABLES = {
    **dict.fromkeys(_ENTRY_BYTES, _table),
    b"stsz": _sizes,
    b"stz2": _compact_sizes,
    b"elst": _edits,
    b"trun": _fragment,
}
