"""Pictures as people send them: what viewers show is taken, and the rest is named."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.image import check_image, decode_image
from embferry.serve.media.video import check_video, decode_video
from tests.serve import pictures

pillow_heif.register_heif_opener()
LIMITS = MediaSettings()
COLOURS = ["red", "lime", "blue", "yellow"]


def refused(data: bytes, limits: MediaSettings = LIMITS, read: Callable[..., object] = decode_image) -> ServeError:
    with pytest.raises(ServeError) as caught:
        read(data, limits)
    assert 400 <= caught.value.http_status < 500
    assert "Plugin" not in caught.value.detail
    return caught.value


def near(found: Image.Image, expected: Image.Image, most: float = 12) -> bool:
    """Returns whether two pictures differ as little as lossy formats change them."""
    left, right = (np.asarray(image.convert("RGB"), np.float32) for image in (found, expected))
    return left.shape == right.shape and float(np.abs(left - right).mean()) < most


def ramp(width: int = 64, height: int = 48) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], 2).astype(np.uint8))


def chunk(name: bytes, body: bytes, check: int | None = None) -> bytes:
    check = zlib.crc32(name + body) if check is None else check
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """Returns a PNG with chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


LARGE = b"\0" * 3_000_000
PNG = pictures.encoded(ramp())
RAW_EXIF = b"Raw profile type exif\0"
METADATA = {
    "a compressed text of 3 MB": chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LARGE)),
    "an international text of 3 MB": chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(LARGE)),
    "a plain text of 3 MB": chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000),
    "a text with a wrong checksum": chunk(b"tEXt", b"Comment\0hello", 1),
    "a time with a wrong checksum": chunk(b"tIME", bytes(7), 1),
    "a large colour profile": chunk(b"iCCP", b"huge\0\0" + zlib.compress(LARGE)),
    "a broken colour profile": chunk(b"iCCP", b"\0\0\xff\xff"),
    "a chunk of its own": chunk(b"abCd", b"anything"),
    "EXIF with a wrong checksum": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0", 1),
    "EXIF that is none": chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    "EXIF with an orientation that is no number": chunk(
        b"eXIf", b"MM\0*\0\0\0\x08\0\1\1\x12\0\5\0\0\0\1\0\0\0\x1a\0\0\0\0" + struct.pack(">II", 1, 0)
    ),
    "EXIF of nothing": chunk(b"eXIf", b""),
    "EXIF of 3 MB": chunk(b"eXIf", LARGE),
    "EXIF as a text with a wrong checksum": chunk(b"tEXt", RAW_EXIF + b"\nexif\n  2\n4d4d\n", 1),
    "EXIF as a text that is none": chunk(b"tEXt", RAW_EXIF + b"\nexif\n  2\nzz\n"),
    "EXIF as a compressed text with a wrong checksum": chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(b"\n"), 1),
    "EXIF as a compressed text of 3 MB": chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(LARGE)),
    "EXIF as a compressed text that is none": chunk(b"zTXt", RAW_EXIF + b"\0broken"),
    "EXIF as a compressed text that is cut off": chunk(
        b"zTXt", RAW_EXIF + b"\0" + zlib.compress(b"\nexif\n" * 99)[:-9]
    ),
    "EXIF as a text compressed in another way": chunk(b"zTXt", RAW_EXIF + b"\7" + zlib.compress(b"\n")),
    "EXIF as a compressed text of nothing": chunk(b"zTXt", RAW_EXIF),
    "EXIF as 400 texts of 250 kB": chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(b"\n" * 250_000)) * 400,
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("place", ["before the pixels", "behind them"])
def test_png_metadata_is_passed_over(name: str, place: str) -> None:
    more = METADATA[name]
    data = with_chunks(PNG, more) if place == "before the pixels" else PNG[:-12] + more + PNG[-12:]
    assert check_image(data, LIMITS) == (64, 48)
    assert decode_image(data, LIMITS).tobytes() == ramp().tobytes()


def test_damaged_png_pixels_are_still_refused() -> None:
    at = PNG.index(b"IDAT") + 20
    assert refused(PNG[:at] + b"\xff\xff\xff" + PNG[at + 3 :]).code in ("image_corrupt", "image_truncated")
    assert refused(chunkless()).code in ("image_corrupt", "image_truncated")


def chunkless() -> bytes:
    return PNG[:33] + chunk(b"tEXt", b"Comment\0nothing else")


@pytest.mark.parametrize("before", [b"", chunk(b"eXIf", b"", 1)], ids=["alone", "after one that is damaged"])
@pytest.mark.parametrize("kind", ["eXIf", "raw profile"])
def test_the_orientation_of_a_png_is_kept(kind: str, before: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    if kind == "eXIf":
        data = pictures.encoded(ramp(), "PNG", exif=exif)
    else:  # as ImageMagick writes it
        text = f"\nexif\n{len(content):8d}\n{content.hex()}\n".encode()
        data = with_chunks(PNG, chunk(b"zTXt", RAW_EXIF + b"\0" + zlib.compress(text)))
    assert decode_image(with_chunks(data, before), LIMITS).size == (48, 64)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("form", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff", b"Exif\0\0MM", b"Exif\0\0MM\0*" + b"\xff" * 40])
def test_damaged_exif_leaves_a_picture_as_it_is(form: str, exif: bytes) -> None:
    assert decode_image(pictures.encoded(ramp(), form, exif=exif), LIMITS).size == (64, 48)


def animation(form: str, count: int = 4, milliseconds: int = 100, size: tuple[int, int] = (20, 10)) -> bytes:
    first, *rest = [Image.new("RGB", size, COLOURS[n % len(COLOURS)]) for n in range(count)]
    options = {"lossless": True} if form == "WEBP" else {}
    more = {} if form == "TIFF" else {"duration": milliseconds}
    return pictures.encoded(first, form, save_all=True, append_images=rest, **more, **options)


def names(frames: list[Image.Image]) -> list[str]:
    colours = {(255, 0, 0): "red", (0, 255, 0): "lime", (0, 0, 255): "blue", (255, 255, 0): "yellow"}
    return [colours[tuple(frame.getpixel((5, 5)))] for frame in frames]  # type: ignore[arg-type, index]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_as_picture_is_its_first_frame(form: str) -> None:
    data = animation(form)
    assert check_image(data, LIMITS) == (20, 10)
    assert names([decode_image(data, LIMITS)]) == ["red"]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_as_video_is_its_frames(form: str) -> None:
    data = animation(form, milliseconds=500)
    header = check_video(data, LIMITS)
    assert (header.width, header.height, header.count, header.seconds) == (20, 10, 4, pytest.approx(2))
    taken = decode_video(data, LIMITS, 2)
    assert (names(taken.frames), taken.fps) == (COLOURS, pytest.approx(2))
    assert names(decode_video(data, LIMITS, 1).frames) == ["red", "blue"]


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_an_animation_without_delays_has_ten_frames_a_second(form: str) -> None:
    data = animation(form, milliseconds=0)
    assert check_video(data, LIMITS).seconds == pytest.approx(0.4)


def test_the_first_picture_of_an_apng_may_be_no_frame_of_it() -> None:
    """It is for viewers that show no animations."""
    frames = [Image.new("RGB", (20, 10), colour) for colour in COLOURS]
    data = pictures.encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True, duration=500)
    assert names([decode_image(data, LIMITS)]) == ["red"]
    assert names(decode_video(data, LIMITS, 2).frames) == COLOURS[1:]


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "JPEG", "GIF"])
def test_a_still_picture_is_no_video(form: str) -> None:
    assert refused(pictures.encoded(ramp(), form), read=check_video).code == "wrong_media_kind"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_a_damaged_animation_as_video_is_a_damaged_video(form: str) -> None:
    """Also where a decoder of pictures finds it."""
    random = np.random.default_rng(5)
    data = animation(form, milliseconds=500)
    codes = set()
    for _ in range(300):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[random.integers(8, len(data), random.integers(1, 6))] = random.integers(0, 256)
        cut = len(data) if random.random() < 0.7 else int(random.integers(12, len(data)))
        for read in (check_video, decode_video):
            try:
                read(broken[:cut].tobytes(), LIMITS)
            except ServeError as error:
                codes.add(error.code)
    assert not {code for code in codes if code.startswith("image_")}
    assert "video_corrupt" in codes


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_an_animation_that_ends_early(form: str) -> None:
    data = animation(form, milliseconds=500)
    assert refused(data[:-60], read=lambda *a: decode_video(*a, 2)).code in ("video_truncated", "video_corrupt")


def test_pages_of_two_sizes_are_no_video() -> None:
    first, second = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20))
    data = pictures.encoded(first, "TIFF", save_all=True, append_images=[second])
    assert decode_image(data, LIMITS).size == (20, 10)
    assert refused(data, read=lambda *a: decode_video(*a, 2)).code == "video_frame_sizes"


def test_a_long_animation() -> None:
    assert refused(animation("PNG", milliseconds=500), MediaSettings(max_video_seconds=1), check_video).code == (
        "video_too_long"
    )


FORMATS = ["AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "TIFF", "BMP", "ICO"]


@pytest.mark.parametrize("form", FORMATS)
def test_more_formats(form: str) -> None:
    size = {"sizes": [(64, 48)]} if form == "ICO" else {}
    data = pictures.encoded(ramp(), form, **size)
    assert check_image(data, LIMITS) == (64, 48)
    assert near(decode_image(data, LIMITS), ramp())
    assert refused(data, MediaSettings(max_pixels=64 * 48 - 1)).code == "media_too_many_pixels"
    assert refused(data, MediaSettings(max_side=63), check_image).code == "media_side_too_long"


@pytest.mark.parametrize("form", ["AVIF", "HEIF"])
def test_the_orientation_of_newer_formats(form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(pictures.encoded(ramp(), form, exif=exif.tobytes()), LIMITS).size == (48, 64)


@pytest.mark.parametrize("form", ["AVIF", "HEIF", "JPEG2000", "PPM", "TGA", "ICO"])
def test_half_a_file_of_more_formats(form: str) -> None:
    data = pictures.encoded(pictures.noise(), form)
    assert refused(data[: len(data) // 2]).code in ("image_truncated", "image_corrupt")


@pytest.mark.parametrize("options", [{"no_jp2": True}, {}], ids=["codestream", "jp2"])
def test_both_kinds_of_jpeg_2000(options: dict[str, bool]) -> None:
    assert near(decode_image(pictures.encoded(ramp(), "JPEG2000", **options), LIMITS), ramp())


@pytest.mark.parametrize("bitmap_format", ["png", "bmp"])
def test_the_largest_picture_of_an_ico(bitmap_format: str) -> None:
    data = pictures.encoded(ramp(256, 256), "ICO", sizes=[(16, 16), (128, 128)], bitmap_format=bitmap_format)
    assert decode_image(data, LIMITS).size == (128, 128)


def test_an_ico_whose_png_claims_more_than_its_entry() -> None:
    bomb = pictures.claimed_png(30_000, 30_000)
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(bomb), 22)
    assert refused(struct.pack("<HHH", 0, 1, 1) + entry + bomb, read=check_image).code == "media_too_many_pixels"


def os2_bitmap(width: int = 64, height: int = 48) -> bytes:
    """Returns a BMP as OS/2 1.x writes it."""
    rows = np.asarray(ramp(width, height))[::-1, :, ::-1].tobytes()
    return (
        b"BM" + struct.pack("<IHHI", 26 + len(rows), 0, 0, 26) + struct.pack("<IHHHH", 12, width, height, 1, 24) + rows
    )


def test_a_bitmap_of_os2() -> None:
    assert check_image(os2_bitmap(), LIMITS) == (64, 48)
    assert decode_image(os2_bitmap(), LIMITS).tobytes() == ramp().tobytes()
    assert refused(os2_bitmap(), MediaSettings(max_side=63), check_image).code == "media_side_too_long"


def test_a_bitmap_of_os2_with_a_short_header_is_refused_by_name() -> None:
    data = b"BM" + struct.pack("<IHHI", 200, 0, 0, 30) + struct.pack("<IIIHH", 16, 8, 8, 1, 24) + bytes(192)
    assert refused(data).code == "image_corrupt"


def test_a_bitmap_with_reserved_bytes() -> None:
    data = pictures.encoded(ramp(), "BMP")
    assert decode_image(data[:6] + b"\1\2\3\4" + data[10:], LIMITS).tobytes() == ramp().tobytes()


@pytest.mark.parametrize("screen", [(0, 0), (0, 10), (20, 0)])
def test_a_gif_with_an_empty_screen(screen: tuple[int, int]) -> None:
    data = pictures.gif(3)
    empty = data[:6] + struct.pack("<HH", *screen) + data[10:]
    assert check_image(empty, LIMITS) == (20, 10)
    assert decode_image(empty, LIMITS).tobytes() == decode_image(data, LIMITS).tobytes()
    assert len(decode_video(empty, LIMITS, 10).frames) == 3


def test_a_gif_with_an_empty_screen_and_no_picture() -> None:
    assert refused(b"GIF89a" + bytes(20)).code == "media_zero_size"


@pytest.mark.parametrize("compression", ["raw", "jpeg"])
def test_a_big_tiff(compression: str) -> None:
    if compression == "raw":
        data = pictures.encoded(ramp(), "TIFF", big_tiff=True)
    else:
        data = tiff_of(pictures.encoded(ramp(), "JPEG"), 64, 48, is_big=True)
    assert data[2] == 43
    assert near(decode_image(data, LIMITS), ramp())


OTHERS = {
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "svg with declaration": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', "SVG"),
    "html": (b"\n<!DOCTYPE html><html>", "web page"),
    "html in capitals": (b"<HTML><BODY>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "json": (b'{"error": "not found"}', "JSON"),
    "zip": (b"PK\3\4" + bytes(30), "archive"),
    "sound": (b"ID3\4" + bytes(30), "sound"),
    "wave": (b"RIFF\0\0\0\0WAVEfmt ", "sound"),
    "photoshop": (b"8BPS\0\1" + bytes(30), "Photoshop"),
    "apple's png": (b"\x89PNG\r\n\x1a\n\0\0\0\4CgBI\x50\0\x20\2" + PNG[8:], "Apple"),
    "jpeg xl": (b"\xff\x0a" + bytes(30), "JPEG XL"),
}


@pytest.mark.parametrize("read", [check_image, check_video])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_picture_is_named(name: str, read: Callable[..., object]) -> None:
    data, word = OTHERS[name]
    refusal = refused(data, read=read)
    assert refusal.code == "unsupported_media_type"
    assert word in refusal.detail
    assert "send" in refusal.detail or "sound" in refusal.detail


def test_jpegs_in_a_tiff_have_few_scans_too() -> None:
    """A strip is a JPEG picture of its own, and may be progressive."""
    white = Image.new("RGB", (2000, 2000), "white")
    plain = pictures.encoded(white, "TIFF", compression="jpeg")
    assert decode_image(plain, LIMITS).size == white.size
    strip = pictures.encoded(white, "JPEG", progressive=True, quality=5)
    last = strip.rindex(b"\xff\xda")
    bomb = strip[:last] + strip[last:-2] * 80 + strip[-2:]
    for content, sound in ((strip, True), (bomb, False)):
        data = tiff_of(content, 2000, 2000)
        if sound:
            assert near(decode_image(data, LIMITS), white)
        else:
            assert "scans" in refused(data, MediaSettings(max_pixels=4_000_000), check_image).detail


def tiff_of(strip: bytes, width: int, height: int, *, is_big: bool = False) -> bytes:
    """Returns a TIFF of one strip, which is a JPEG picture."""
    start, count, entry_layout = ("<2sHHHQ", "<Q", "<HHQQ") if is_big else ("<2sHI", "<H", "<HHII")
    depths = 8 | 8 << 16 | 8 << 32 if is_big else 400  # in place, or where they are
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, depths), (259, 3, 1, 7), (262, 3, 1, 6)]
    entries += [(273, 4, 1, 500), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(strip))]
    entries += [(284, 3, 1, 1), (530, 3, 2, 2 | 2 << 16)]
    head = struct.pack(start, b"II", 43, 8, 0, 16) if is_big else struct.pack(start, b"II", 42, 8)
    head += struct.pack(count, len(entries)) + b"".join(struct.pack(entry_layout, *entry) for entry in entries)
    return head.ljust(400, b"\0") + struct.pack("<3H", 8, 8, 8).ljust(100, b"\0") + strip


def test_no_message_names_a_constant_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Image.Image:
        raise ValueError("Decompressed data too large for PngImagePlugin.MAX_TEXT_CHUNK")

    monkeypatch.setattr(Image, "open", fails)
    assert "MAX_TEXT_CHUNK" not in refused(PNG).detail
