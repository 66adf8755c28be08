"""Pictures that decoders read otherwise than viewers do: uncovered parts of GIF, comments of PPM, ends of JPEG."""

from __future__ import annotations

import io
import re
import struct

import pytest
from PIL import Image

from embferry.serve.errors import ServeError
from embferry.serve.media.image import check_image, decode_image
from embferry.serve.media.video import decode_video
from tests.serve import pictures
from tests.serve.test_media_pictures import LIMITS, PNG, chunk, refused


def gif_of(*frames: tuple[int, int, int], screen: tuple[int, int] = (8, 6), background: int = 1) -> bytes:
    """Returns a GIF whose frames (left, top, colour) have 4 × 3 pixels; the colours are red, lime, blue and black."""
    table = bytes((255, 0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0))
    data = b"GIF89a" + struct.pack("<HHBBB", *screen, 0x91, background, 0) + table
    control = b"\x21\xf9\x04" + bytes((2 << 2, 50, 0, 0, 0))  # half a second; then back to the background
    codes = [4, *[2, 2, 4] * 6, 5]  # LZW of 3 bits: clear the table, two pixels, and so on; the end
    for left, top, colour in frames:
        bits = "".join(f"{colour if code == 2 else code:03b}" for code in reversed(codes))
        packed = int(bits, 2).to_bytes((len(bits) + 7) // 8, "little")
        data += control + struct.pack("<BHHHHBBB", 0x2C, left, top, 4, 3, 0, 2, len(packed)) + packed + b"\0"
    return data + b";"


@pytest.mark.parametrize("place", [(2, 1), (0, 0), (4, 3), (0, 3)])
@pytest.mark.parametrize("background", [0, 1, 3])
def test_what_the_first_frame_of_a_gif_does_not_cover_is_white(place: tuple[int, int], background: int) -> None:
    """As in browsers, for each colour of the background."""
    expected = Image.new("RGB", (8, 6), "white")
    expected.paste((0, 0, 255), (*place, place[0] + 4, place[1] + 3))
    data = gif_of((*place, 2), (0, 0, 0), background=background)
    assert decode_image(data, LIMITS).tobytes() == expected.tobytes()
    assert decode_image(gif_of((*place, 2), background=background), LIMITS).tobytes() == expected.tobytes()


@pytest.mark.parametrize("background", [0, 1, 3])
@pytest.mark.parametrize("colours", [0, 4, 4 + 1, 256])
def test_what_a_frame_of_a_gif_film_does_not_cover_is_white(background: int, colours: int) -> None:
    """At the start, and where a frame is taken away."""
    data = gif_of((2, 1, 2), (0, 3, 0), background=background)
    table = data[13:25]
    if colours == 0:  # a table for each frame instead
        data = data[:10] + bytes((0x11,)) + data[11:13] + data[25:]
        for place in ((2, 1), (0, 3)):
            head = struct.pack("<BHHHH", 0x2C, *place, 4, 3)
            data = data.replace(head + b"\0", head + b"\x81" + table)
    elif colours > 4:  # one is white, or the lightest
        more = b"\xff\xff\xff" + bytes(9) if colours == 5 else b"\xff\xff\xf0" + bytes(3 * 251)
        data = data[:10] + bytes((0x92 if colours == 5 else 0x97,)) + data[11:25] + more + data[25:]
    white = 0xF0 if colours == 256 else 0xFF
    for frame, place, colour in zip(
        decode_video(data, LIMITS, 2).frames, ((2, 1), (0, 3)), ((0, 0, 255), (255, 0, 0)), strict=True
    ):
        expected = Image.new("RGB", (8, 6), (255, 255, white))
        expected.paste(colour, (*place, place[0] + 4, place[1] + 3))
        assert frame.tobytes() == expected.tobytes()


def test_a_gif_whose_frame_covers_its_screen_is_as_it_was() -> None:
    assert set(decode_image(gif_of((0, 0, 1), screen=(4, 3)), LIMITS).get_flattened_data()) == {(0, 255, 0)}


@pytest.mark.parametrize("comment", [b"#", b"#\n", b"# a comment\r\n", b"#1 2 3\n#\n"])
def test_comments_anywhere_in_a_plain_ppm(comment: bytes) -> None:
    end = b"\n"
    data = b"P3 " + comment + end + b"2 " + comment + end + b"1 255" + comment + end
    data += b"1 2 3 4" + comment + end + b"5 6" + comment
    assert decode_image(data, LIMITS).tobytes() == bytes((1, 2, 3, 4, 5, 6))
    bits = b"P1" + end + comment + end + b"8 1" + comment + end + b"0101" + comment + end + b"0101" + comment
    assert decode_image(bits, LIMITS).convert("L").tobytes() == b"\xff\0" * 4


@pytest.mark.parametrize(
    ("head", "body"), [(b"P5 %b2#\n%b\n2 %b\n255\n", b"#\n# "), (b"P4 %b\n%b\n4 %b\n4\n", b"#\n\n#")]
)
def test_comments_in_the_header_of_a_binary_ppm(head: bytes, body: bytes) -> None:
    """A byte of a pixel may look like a comment."""
    plain, commented = head % (b"", b"", b""), head % ((b"#12 #" * 9 + b"\n",) * 3)
    found = decode_image(commented + body, LIMITS)
    assert found.tobytes() == decode_image(plain + body, LIMITS).tobytes()
    assert len(set(found.get_flattened_data())) > 1


@pytest.mark.parametrize("head", [b"P1 8 1", b"P3 1 1 255", b"P2 1 1 255", b"P6 1 1 255", b"P3 ", b"P6 ", b"P5 1"])
def test_no_decoder_sees_many_comments(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs it a copy of what follows."""
    real = Image.open

    def opened(file: io.BytesIO, **options: object) -> Image.Image:
        assert b"#" not in file.getvalue()
        return real(file, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image, "open", opened)
    data = head[:3] + head[3:].replace(b" ", b"#\n" * 10_000 + b" ") + b"\n"
    data += (b"#\n" * 10_000 if head[1:2] in b"123" else b"") + b" 0 0 0 0 0 0 0 0"
    try:
        decode_image(data, LIMITS)
    except ServeError as error:
        assert error.code in ("image_corrupt", "image_truncated")  # noqa: PT017


def test_a_png_that_does_not_begin_with_its_header() -> None:
    """Also in an ICO, where its size was nonsense."""
    body = PNG[:8] + b"\0\0\0\4CgBI\x50\0\x20\2" + bytes(4) + PNG[8:]
    entry = struct.pack("<BBBBHHII", 64, 48, 0, 0, 1, 32, len(body), 22)
    odd = PNG[:8] + chunk(b"tEXt", b"a\0b") + PNG[8:]
    for data in (struct.pack("<HHH", 0, 1, 1) + entry + body, odd):
        refusal = refused(data, read=check_image)
        assert refusal.code == "image_corrupt"
        assert "IHDR" in refusal.detail


@pytest.mark.parametrize(("kind", "map_bits", "bits"), [(2, 0, 15), (10, 0, 15), (1, 15, 8), (9, 15, 8)])
def test_a_tga_of_15_bits_is_refused_by_name(kind: int, map_bits: int, bits: int) -> None:
    is_mapped = kind & 7 == 1
    head = struct.pack("<BBBHHBHHHHBB", 0, is_mapped, kind, 0, 4 * is_mapped, map_bits, 0, 0, 2, 2, bits, 0)
    refusal = refused(head + bytes(40), read=check_image)
    assert refusal.code == "unsupported_media_type"
    assert "15 bits" in refusal.detail


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("side", [8, 64, 300])
@pytest.mark.parametrize("kind", ["flat", "noisy"])
@pytest.mark.parametrize("missing", [1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_only_its_end_is_read(
    mode: str, side: int, kind: str, missing: int, progressive: bool
) -> None:
    picture = pictures.noise(side, side, mode) if kind == "noisy" else Image.new(mode, (side, side), 0)
    data = pictures.encoded(picture, "JPEG", progressive=progressive)
    assert decode_image(data[:-missing], LIMITS).tobytes() == decode_image(data, LIMITS).tobytes()


WITHOUT_PIXELS = {(8, 3), (64, 3), (300, 3), (300, 4)}
"""Side of a flat progressive picture, and its last bytes, in which no pixel can be: the code of its last scan has one
word, "nothing changes for so many blocks"."""


@pytest.mark.parametrize("side", [8, 64, 300])
@pytest.mark.parametrize("kind", ["flat", "noisy"])
@pytest.mark.parametrize("missing", [3, 4, 5, 9, 17, 40])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_is_not_read(side: int, kind: str, missing: int, progressive: bool) -> None:
    picture = pictures.noise(side, side) if kind == "noisy" else Image.new("RGB", (side, side), "red")
    data = pictures.encoded(picture, "JPEG", progressive=progressive)
    if progressive and kind == "flat" and (side, missing) in WITHOUT_PIXELS:
        assert decode_image(data[:-missing], LIMITS).tobytes() == decode_image(data, LIMITS).tobytes()
    else:
        assert refused(data[:-missing]).code == "image_truncated"


@pytest.mark.parametrize("kind", ["flat", "noisy"])
def test_a_progressive_jpeg_that_lacks_its_last_scans_is_not_read(kind: str) -> None:
    picture = pictures.noise(64, 64) if kind == "noisy" else Image.new("RGB", (64, 64), "red")
    data = pictures.encoded(picture, "JPEG", progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert len(scans) > 5
    for number, at in enumerate(scans[1:]):
        assert refused(data[:at]).code == "image_truncated", number
        assert refused(data[: at + 5]).code == "image_truncated", number
