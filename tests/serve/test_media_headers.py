"""The claims of headers are checked against the file, by pure functions of its bytes whose work is bounded."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import containers
from embferry.serve.media import image as image_module
from embferry.serve.media import video as video_module
from embferry.serve.media.headers import asf, avi, jpeg, matroska, mp4, ogg, png, tiff, webp
from embferry.serve.media.headers.claims import ClaimError
from tests.serve import pictures

LIMITS = MediaSettings()
HUGE = 0xFFFF_FFFF


def box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def table(name: bytes, *numbers: int, entries: bytes = b"") -> bytes:
    return box(name, bytes(4), struct.pack(f">{len(numbers)}I", *numbers), entries)


def nested(*inner: bytes, path: str = "moov trak mdia minf stbl") -> bytes:
    content = b"".join(inner)
    for name in reversed(path.split()):
        content = box(name.encode(), content)
    return content


def film(*boxes: bytes) -> bytes:
    """Returns an MP4 of about 1.5 kB."""
    return box(b"ftyp", b"isom", bytes(4)) + box(b"mdat", bytes(1000)) + b"".join(boxes)


SIZES = table(b"stsz", 1, HUGE)
MP4_BOMBS = {
    "constant size": film(nested(SIZES)),
    "constant size, three tracks": film(*[nested(table(b"stsz", 1, 600))] * 3),
    "one size in a table": film(nested(table(b"stsz", 0, HUGE))),
    "small sizes": film(nested(box(b"stz2", bytes(7), b"\x04", struct.pack(">I", HUGE)))),
    "sizes of no width": film(nested(box(b"stz2", bytes(8), struct.pack(">I", HUGE)))),
    **{name: film(nested(table(name.encode(), HUGE))) for name in ("stco", "co64", "stsc", "stts", "ctts", "stss")},
    "a fragment": film(nested(box(b"trun", bytes(4), struct.pack(">I", HUGE)), path="moof traf")),
    "fragments": film(*[nested(box(b"trun", bytes(4), struct.pack(">I", 600)), path="moof traf")] * 3),
    "a fragment with fields": film(
        nested(box(b"trun", b"\0\0\x0f\0", struct.pack(">I", 9), bytes(80)), path="moof traf")
    ),
    "edits": film(nested(table(b"elst", HUGE), path="moov trak edts")),
    "edits of a long track": film(
        nested(
            nested(table(b"elst", 40_000, entries=bytes(12 * 40_000)), path="edts")
            + nested(table(b"stsz", 1, 400_000), path="mdia minf stbl"),
            path="moov trak",
        )
    ),
    "overlapping samples": film(nested(table(b"stsz", 0, 9, entries=struct.pack(">9I", *[1000] * 9)))),
    "a compressed index": film(nested(box(b"cmov", bytes(50)), path="moov")),
    "a collection of pictures": film(box(b"meta", bytes(4), box(b"hdlr", bytes(24)), box(b"iloc", bytes(8)))),
    "in QuickTime's meta": film(nested(box(b"meta", box(b"hdlr", bytes(24)), SIZES), path="moov")),
    "in user data": film(nested(SIZES, path="moov udta trak mdia minf stbl")),
    "in the description of samples": film(nested(box(b"stsd", bytes(8), box(b"mp4v", bytes(78), box(b"wave", SIZES))))),
    "a box of 64 bits": film(
        nested(struct.pack(">I4sQ", 1, b"stsz", 36), bytes(4), struct.pack(">II", 1, HUGE), bytes(8))
    ),
    "a box to the end": film(struct.pack(">I4s", 0, b"moov") + SIZES),
    "deep": film(nested(SIZES, path="moov " * 40)),
    "many boxes": film(box(b"free") * 400_000),
    "many tracks": film(nested(box(b"trak") * 100, path="moov")),
}


@pytest.mark.parametrize("name", MP4_BOMBS)
def test_an_mp4_that_claims_more_than_it_holds_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClaimError):
        mp4.check(MP4_BOMBS[name])
    monkeypatch.setattr(containers.av, "open", lambda *_, **__: pytest.fail("a decoder has seen it"))
    with pytest.raises(ServeError) as caught:
        video_module.check_video(MP4_BOMBS[name], LIMITS)
    assert caught.value.code in ("video_corrupt", "video_truncated")


def scans(count: int) -> bytes:
    """Returns a JPEG of one progressive scan, repeated."""
    data = pictures.encoded(pictures.noise(), "JPEG", progressive=True)
    first = data.index(b"\xff\xda")
    rest = data[first + 2 :]
    second = first + 2 + min(at for at in (rest.find(b"\xff\xda"), rest.find(b"\xff\xc4")) if at > 0)
    return data[:first] + data[first:second] * count + b"\xff\xd9"


def check_jpeg(data: bytes) -> None:
    jpeg.check(data, LIMITS.max_pixels)


def test_a_jpeg_of_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_jpeg(scans(jpeg.MAX_SCANS))
    with pytest.raises(ClaimError, match="scans"):
        check_jpeg(scans(jpeg.MAX_SCANS + 1))
    with pytest.raises(ClaimError, match="segments"):
        check_jpeg(b"\xff\xd8" + b"\xff\xfe\0\2" * 20_000)
    monkeypatch.setattr(image_module.Image, "open", lambda *_, **__: pytest.fail("a decoder has seen it"))
    with pytest.raises(ServeError) as caught:
        image_module.decode_image(scans(6000), LIMITS)
    assert caught.value.code == "image_corrupt"


@pytest.mark.parametrize("frame", sorted(jpeg._FRAMES), ids=hex)
def test_the_more_pixels_a_jpeg_has_the_fewer_scans_it_may_have(frame: int) -> None:
    data = scans(2 * jpeg.MAX_PASSES).replace(b"\xff\xc2", bytes((0xFF, frame)), 1)
    width, height = pictures.noise().size
    jpeg.check(data, 2 * width * height)
    with pytest.raises(ClaimError, match="pixels"):
        jpeg.check(data, 2 * width * height - 1)


def test_a_picture_whose_scans_pass_over_too_many_pixels_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its scans is of some bytes, and passes over all of its 16 million pixels."""
    white = pictures.encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True, quality=5)
    last = white.rindex(b"\xff\xda")
    bomb = white[:last] + white[last:-2] * 80 + white[-2:]
    image_module.check_image(white, LIMITS)
    monkeypatch.setattr(image_module.Image, "open", lambda *_, **__: pytest.fail("a decoder has seen it"))
    for read in (image_module.check_image, image_module.decode_image):
        with pytest.raises(ServeError) as caught:
            read(bomb, LIMITS)
        assert caught.value.code == "image_corrupt"
        assert "media.max_pixels" in caught.value.detail


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_the_largest_progressive_picture_is_taken(mode: str) -> None:
    data = pictures.encoded(pictures.noise().convert(mode), "JPEG", progressive=True)
    width, height = pictures.noise().size
    jpeg.check(data, width * height)


def test_scans_in_comments_and_behind_the_end_do_not_count() -> None:
    data = pictures.encoded(pictures.noise(), "JPEG")
    check_jpeg(data[:2] + b"\xff\xfe" + struct.pack(">H", 2002) + b"\xff\xda" * 1000 + data[2:] + b"\xff\xda" * 1000)


EBML = b"\x1aE\xdf\xa3\x80"
SEGMENT = b"\x18S\x80g\x01\xff\xff\xff\xff\xff\xff\xff"  # of unknown length


def element(name: bytes, content: bytes) -> bytes:
    return name + (0x1000_0000 | len(content)).to_bytes(4) + content


MATROSKA_BOMBS = {
    "tracks": EBML + SEGMENT + element(b"\x16T\xaek", b"\xae\x80" * 100),
    "tracks beside": EBML + SEGMENT + b"\xae\x80" * 100,
    "cues": EBML + SEGMENT + element(b"\x1cS\xbbk", b"\xbb\x80" * 300_000),
    "tags in a segment of known length": EBML
    + element(b"\x18S\x80g", element(b"\x12T\xc3g", b"\x73\x73\x80" * 300_000)),
    "chapters in chapters": EBML
    + SEGMENT
    + b"\x10C\xa7p\x8f"
    + b"".join(bytes([0xB6, 0x8F - n]) for n in range(15))
    + b"\xb6\x80" * 300_000,
    "frames": EBML + SEGMENT + b"\x1fC\xb6u\x01\xff\xff\xff\xff\xff\xff\xff" + b"\xa3\x80" * 1_100_000,
}


@pytest.mark.parametrize("name", MATROSKA_BOMBS)
def test_a_matroska_file_of_many_elements_is_refused(name: str) -> None:
    with pytest.raises(ClaimError):
        matroska.check(MATROSKA_BOMBS[name])


def chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content


AVI_BOMBS = {
    "streams": chunk(b"RIFF", b"AVI " + chunk(b"LIST", b"hdrl" + chunk(b"strh", b"") * 100)),
    "an index of overlapping frames": chunk(
        b"RIFF", b"AVI " + chunk(b"idx1", struct.pack("<4sIII", b"00dc", 0, 4, 900) * 9)
    ),
    "lists in lists": chunk(b"RIFF", b"AVI " + struct.pack("<4sI4s", b"LIST", 9999, b"hdrl") * 30),
    "many chunks": chunk(b"RIFF", b"AVI " + chunk(b"JUNK", b"") * 1_100_000),
}


@pytest.mark.parametrize("name", AVI_BOMBS)
def test_an_avi_that_claims_more_than_it_holds_is_refused(name: str) -> None:
    with pytest.raises(ClaimError):
        avi.check(AVI_BOMBS[name])


VIDEOS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    ".mp4": (mp4.check, pictures.video(40, 10)),
    "index first": (mp4.check, pictures.video(40, 10, index_first=True)),
    ".mov": (mp4.check, pictures.video(40, 10, suffix=".mov")),
    ".mkv": (matroska.check, pictures.video(40, 10, suffix=".mkv")),
    ".avi": (avi.check, pictures.video(40, 10, suffix=".avi")),
    ".jpg": (check_jpeg, pictures.encoded(pictures.noise(), "JPEG", progressive=True)),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_sound_files_pass_whole_and_cut_off(name: str) -> None:
    check, data = VIDEOS[name]
    check(data)
    for length in (*range(200), *range(len(data) - 400, len(data))):
        try:
            check(data[:length])
        except ClaimError as error:
            if not error.truncated:
                raise


@pytest.mark.parametrize("parser", ["mp4", "matroska", "avi", "jpeg"])
def test_any_bytes_pass_or_are_refused(parser: str) -> None:
    rng = np.random.default_rng(11)
    check = {"mp4": mp4.check, "matroska": matroska.check, "avi": avi.check, "jpeg": check_jpeg}[parser]
    sound = [data for checked_by, data in VIDEOS.values() if checked_by is check]
    for round in range(400):
        data = bytearray(sound[round % len(sound)])
        for at in rng.integers(0, len(data), 1 + round % 9).tolist():
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))]))
        for candidate in (bytes(data), rng.bytes(round)):
            with contextlib.suppress(ClaimError):
                check(candidate)


def test_an_ogg_file_of_many_streams_is_refused() -> None:
    page = b"OggS\0\2" + bytes(22)
    ogg.check(page * ogg.MAX_STREAMS)
    with pytest.raises(ClaimError, match="streams"):
        ogg.check(page * (ogg.MAX_STREAMS + 1))


def asf_object(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return name + (24 + len(body) if size is None else size).to_bytes(8, "little") + body


def asf_stream(own: int, bitmap: int = 40) -> bytes:
    video = bytes.fromhex("C0EF19BC4D5BCF11A8FD00805F5C442B")
    head = video + bytes(24) + own.to_bytes(4, "little") + bytes(4 + 2 + 4)
    return asf_object(asf.STREAM, head + bytes(11) + bitmap.to_bytes(4, "little") + bytes(36))


ASF_HEAD = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\0\xaa\0\x62\xce\x6c" + bytes(14)
ASF_BOMBS = {
    "an object beyond the file": asf_object(asf.PADDING, b"", 1 << 40),
    "an object beyond the file in the extension": asf_object(asf.EXTENSION, bytes(22))
    + asf_object(b"x" * 16, b"", HUGE),
    "a long description of a stream": asf_stream(HUGE),
    "a long bitmap header": asf_stream(51, HUGE),
    "many streams": asf_stream(51) * 65,
    "many objects": asf_object(asf.PADDING, b"") * 20_000,
}


@pytest.mark.parametrize("name", ASF_BOMBS)
def test_an_asf_that_claims_more_than_it_holds_is_refused(name: str) -> None:
    with pytest.raises(ClaimError):
        asf.reduced(ASF_HEAD + ASF_BOMBS[name])


def test_metadata_of_an_asf_file_becomes_padding() -> None:
    """A demuxer would reserve memory by the lengths in them."""
    marker = bytes.fromhex("01CD87F451A9CF118EE600C00C205365")
    kept, data = asf_stream(51), asf_object(asf.DATA, b"data")
    found = asf.reduced(ASF_HEAD + asf_object(marker, b"xyz") + kept + data + asf_object(marker, b"behind"))
    assert found == ASF_HEAD + asf_object(asf.PADDING, b"xyz") + kept + data + asf_object(marker, b"behind")


def test_the_counts_of_frames_and_pages_are_bounded() -> None:
    frame = struct.pack(">I4s", 26, b"fcTL") + bytes(30)
    control = struct.pack(">I4s", 8, b"acTL") + bytes(12)
    assert len(png.delays(png.SIGNATURE + control + frame * 50)[0]) == 50
    with pytest.raises(ClaimError, match="frames"):
        png.delays(png.SIGNATURE + control + frame * (png.MAX_FRAMES + 1))
    head = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\x02" + bytes(9)
    moved = b"ANMF\x10\0\0\0" + bytes(16)
    assert len(webp.delays(head + moved * 50)) == 50
    with pytest.raises(ClaimError, match="frames"):
        webp.delays(head + moved * (webp.MAX_FRAMES + 1))
    pages = b"".join(struct.pack("<HI", 0, 8 + 6 * (number + 1)) for number in range(tiff.MAX_PAGES + 1))
    assert tiff.pages(b"II*\0\x08\0\0\0" + pages[:60]) == 10
    assert tiff.pages(b"II*\0\x08\0\0\0" + struct.pack("<HI", 0, 8)) == 1, "it leads back to itself"
    with pytest.raises(ClaimError, match="pages"):
        tiff.pages(b"II*\0\x08\0\0\0" + pages)


@pytest.mark.parametrize("places", [[(0, 100)] * 5, [(0, 0)] * 101])
def test_pieces_that_repeat_the_file_are_refused(places: list[tuple[int, int]]) -> None:
    with pytest.raises(ClaimError, match="pieces"):
        jpeg.check_pieces(bytes(100), places, 1000)
