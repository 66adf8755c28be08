"""Videos as cameras, editors and browsers write them: the frames that a player shows are taken."""

from __future__ import annotations

import io
import re

import av
import numpy as np
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding.pool import DecoderPool
from embferry.serve.media.video import Frames, check_video, decode_video
from tests.serve import pictures
from tests.serve.films import SIZE, boxes, damaged, film, with_boxes

LIMITS = MediaSettings()


def numbers(taken: Frames) -> list[int]:
    """Returns the numbers of the sampled frames, by their brightness."""
    return [round(float(np.asarray(frame).mean()) / 10) for frame in taken.frames]


def refused(data: bytes, fps: float | None = None) -> ServeError:
    with pytest.raises(ServeError) as caught:
        decode_video(data, LIMITS, fps)
    assert 400 <= caught.value.http_status < 500
    return caught.value


@pytest.mark.parametrize("form", ["mp4", "mov"])
@pytest.mark.parametrize("hidden", [3, 5, 7, 12])
def test_trimmed_by_an_edit_list(form: str, hidden: int) -> None:
    data = film(form, hidden=hidden)
    header = check_video(data, LIMITS)
    assert (header.count, header.seconds) == (20 - hidden, pytest.approx((20 - hidden) / 10))
    assert numbers(decode_video(data, LIMITS, 10)) == list(range(hidden, 20))
    assert numbers(decode_video(data, LIMITS, 2)) == list(range(hidden, 20, 5))[: (20 - hidden) // 5]


def test_trimmed_by_an_edit_list_and_cut_off() -> None:
    assert refused(film(hidden=7, muxer={"movflags": "faststart"})[:-30]).code == "video_truncated"


@pytest.mark.parametrize(
    ("form", "codec"), [("mp4", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")]
)
@pytest.mark.parametrize("sound", [1, 6])
def test_sound_that_is_longer_or_shorter_than_the_picture(form: str, codec: str, sound: float) -> None:
    data = film(form, codec, sound=sound)
    assert check_video(data, LIMITS).seconds == pytest.approx(2, abs=0.11)
    shifted = form == "avi"  # FFmpeg writes an empty frame after its first, which shows that one longer
    assert numbers(decode_video(data, LIMITS, 2)) == ([0, 4, 9, 14] if shifted else [0, 5, 10, 15])


@pytest.mark.parametrize("muxer", [{"live": "1"}, {"cluster_time_limit": "300"}], ids=["no duration", "clusters"])
def test_a_duration_of_the_container_alone_or_none(muxer: dict[str, str]) -> None:
    """As browsers record: without a duration, or with that of all streams together."""
    data = film("webm", "libvpx", muxer=muxer)
    assert numbers(decode_video(data, LIMITS, 2)) == [0, 5, 10, 15]


def test_a_duration_of_the_container_that_is_too_long() -> None:
    """As of a recording whose sound or subtitles were taken out."""
    data = film("matroska")
    at = data.index(b"\x44\x89\x88") + 3
    longer = data[:at] + np.array([9000.0], ">f8").tobytes() + data[at + 8 :]
    assert numbers(decode_video(longer, LIMITS, 2)) == [0, 5, 10, 15]


def test_a_cover_picture_is_the_first_stream() -> None:
    data = film(still="cover")
    first = with_boxes(data, lambda inner: sorted(inner, key=lambda box: box[4:8] != b"udta"))
    for sent in (data, first):
        assert decode_video(sent, LIMITS).frames[0].size == SIZE
        assert numbers(decode_video(sent, LIMITS, 2)) == [0, 5, 10, 15]


def test_only_a_cover_picture() -> None:
    sound = with_boxes(film(still="cover"), lambda inner: [box for box in inner if box[4:8] != b"trak"])
    assert refused(sound).code == "video_corrupt"
    assert "attached picture" in refused(sound).detail


@pytest.mark.parametrize(("form", "codec"), [("matroska", "libx264"), ("asf", "wmv2")])
def test_a_small_still_is_the_first_stream(form: str, codec: str) -> None:
    assert numbers(decode_video(film(form, codec, still="track"), LIMITS, 2)) == [0, 5, 10, 15]


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("avi", "mpeg4")],
)
def test_one_damaged_region(form: str, codec: str) -> None:
    """The packets of frames 11 to 14 do not decode."""
    data = damaged(film(form, codec, 40, encoder={"bf": "0"} if codec != "libvpx" else {}), 11, 14)
    assert numbers(decode_video(data, LIMITS, 1)) == [0, 10, 20, 4]
    refusal = refused(data, 10)
    assert refusal.code == "video_corrupt"
    assert "damaged between 1.1 and 1.4 seconds" in refusal.detail
    assert "4 of 40 sampled frames" in refusal.detail


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("avi", "mpeg4"), ("avi", "libx264")],
)
def test_a_tail_that_does_not_decode(form: str, codec: str) -> None:
    data = damaged(film(form, codec, 20), 17, 19)
    assert numbers(decode_video(data, LIMITS, 2)) == [0, 5, 10, 15]
    assert refused(data, 10).code == "video_corrupt"


@pytest.mark.parametrize("form", ["avi", "matroska", "mp4"])
def test_frames_that_are_decoded_in_another_order_than_they_are_shown(form: str) -> None:
    """AVI does not say when a frame is shown."""
    assert numbers(decode_video(film(form, encoder={"bf": "3"}), LIMITS, 10)) == list(range(20))


@pytest.mark.parametrize("cut_head", [1, 3])
def test_a_recording_that_begins_between_whole_frames(cut_head: int) -> None:
    data = film("matroska", cut_head=cut_head, encoder={"bf": "0", "sc_threshold": "0"})
    assert numbers(decode_video(data, LIMITS, 10)) == list(range(5, 20))


@pytest.mark.parametrize(
    ("form", "codec", "own", "name"),
    [
        ("mp4", "libx264", b"avc1", b"zzzz"),
        ("mov", "libx264", b"avc1", b"zz\xff\n"),
        ("avi", "mpeg4", b"FMP4", b"zzzz"),
        ("matroska", "libx264", b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/ZZZ"),
    ],
)
def test_a_codec_that_no_decoder_knows(form: str, codec: str, own: bytes, name: bytes) -> None:
    refusal = refused(film(form, codec).replace(own, name))
    assert refusal.code == "unsupported_media_type"
    assert name.decode("latin-1")[:2] in refusal.detail
    assert refusal.detail.isprintable()
    with pytest.raises(ServeError):
        check_video(film(form, codec).replace(own, name), LIMITS)


@pytest.mark.parametrize("packet", [188, 192])
@pytest.mark.parametrize("sound", [0, 1])
@pytest.mark.parametrize("codec", ["libvpx", "ffv1", "snow", "mjpeg"])
def test_a_codec_that_mpeg_ts_does_not_name(codec: str, sound: float, packet: int) -> None:
    data = film("mpegts", codec, sound=sound, muxer={"mpegts_m2ts_mode": "1"} if packet == 192 else {})
    refusal = refused(data)
    assert refusal.code == "unsupported_media_type"
    types = "0x06" + (", 0x0f" if packet == 188 else ", 0x06") * bool(sound)
    assert f"(stream type {types})" in refusal.detail


@pytest.mark.parametrize("codec", ["libvpx", "ffv1", "snow", "mjpeg", "flv1"])
def test_a_codec_that_mpeg_ps_does_not_name(codec: str) -> None:
    assert refused(film("mpeg", codec, sound=1)).code == "unsupported_media_type"


@pytest.mark.parametrize(
    ("form", "codec", "header"),
    [
        ("mpegts", "mpeg2video", b"\0\0\1\xb3"),
        ("mpegts", "libx264", b"\0\0\0\1\x67"),
        ("mpegts", "mpeg4", b"\0\0\1\x20"),
        ("flv", "libx264", b"\x67"),
    ],
)
def test_a_stream_that_never_says_how_large_its_pictures_are(form: str, codec: str, header: bytes) -> None:
    data = film(form, codec)
    damaged = data.replace(header, header[:-1] + b"\x6c")
    assert damaged != data
    refusal = refused(damaged)
    assert refusal.code == "video_corrupt"
    assert "how large its pictures are" in refusal.detail


@pytest.mark.parametrize("form", ["mpegts", "mpeg"])
def test_sound_alone_is_no_video_of_an_unknown_codec(form: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream("mp2", rate=48_000)
        for at in range(0, 96_000, 1152):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), format="s16", layout="stereo")
            frame.sample_rate, frame.pts = 48_000, at
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(file.getvalue()).code == "video_corrupt"


def test_a_fragment_for_each_frame() -> None:
    """As some recorders write for a low delay: seven boxes a frame."""
    one = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
    data = film(codec="mpeg4", frames=17_000, rate=30, gop=12, muxer=one)
    assert check_video(data, LIMITS).count == 17_000


def test_fragments_that_end_early_are_shown_to_their_end() -> None:
    data = film(muxer={"movflags": "frag_keyframe+empty_moov"})
    whole = boxes(data)
    last = max(at for at, box in enumerate(whole) if box[4:8] == b"moof")
    assert numbers(decode_video(b"".join(whole[:last]), LIMITS, 10)) == list(range(15))
    assert refused(b"".join(whole[: last + 2])[:-20]).code == "video_truncated"


def test_jpegs_in_a_video_have_few_scans_too() -> None:
    data = film("avi", "mjpeg", 3)
    scans = pictures.encoded(pictures.noise(16, 16), "JPEG", progressive=True)
    last = scans.rindex(b"\xff\xda")
    bomb = scans[:last] + scans[last:-2] * 120 + scans[-2:]
    at = data.index(b"00dc", data.index(b"movi")) + 8
    size = int.from_bytes(data[at - 4 : at], "little")
    longer = bomb + bytes(len(bomb) % 2)
    frames = (
        data[: at - 4] + len(bomb).to_bytes(4, "little") + longer + data[at + size + size % 2 : data.index(b"idx1")]
    )
    assert numbers(decode_video(data, LIMITS, 10)) == [0, 1, 2]
    assert "scans" in refused(frames, 10).detail


def test_the_index_of_an_flv_reserves_no_memory() -> None:
    """A list of key frames, of which FFmpeg would reserve a gigabyte by its count."""

    def text(word: bytes) -> bytes:
        return len(word).to_bytes(2) + word

    data = film("flv")
    count = (1 << 27).to_bytes(4)
    body = b"\2" + text(b"onMetaData") + b"\x08\0\0\0\1" + text(b"keyframes") + b"\3" + text(b"times") + b"\x0a" + count
    tag = b"\x12" + (len(body) + 2000).to_bytes(3) + bytes(7) + body + bytes(2000)
    bomb = data[:13] + tag + len(tag).to_bytes(4) + data[13:]
    pool = DecoderPool(1)
    try:
        assert len(pool.run("decode_video", [bomb], MediaSettings(decode_memory=256 << 20)).frames) == 4
    finally:
        pool.close()


CONTAINERS = [
    ("mpegts", "libx264"),
    ("mpegts", "mpeg2video"),
    ("mpeg", "mpeg2video"),
    ("mpeg", "mpeg1video"),
    ("flv", "libx264"),
    ("flv", "flv"),
    ("asf", "wmv2"),
    ("asf", "msmpeg4v3"),
    ("ogg", "libvpx"),
]


@pytest.mark.parametrize("sound", [0, 4])
@pytest.mark.parametrize(("form", "codec"), CONTAINERS)
def test_more_containers(form: str, codec: str, sound: float) -> None:
    data = film(form, codec, 50, 25, sound=sound, encoder={"bf": "0"} if codec == "libx264" else {})
    header = check_video(data, LIMITS)
    assert (header.width, header.height, header.count) == (*SIZE, 50)
    assert header.seconds == pytest.approx(2, abs=0.15)
    taken = decode_video(data, LIMITS, 2)
    assert len(taken.frames) == 4
    assert np.abs(np.array(numbers(taken)) - [0, 12, 25, 12]).max() <= 2  # MPEG-PS has its first times rounded


@pytest.mark.parametrize("packet", [192, 204])
def test_mpeg_ts_with_longer_packets(packet: int) -> None:
    """As camcorders (M2TS, with a time before each packet) and broadcasters (with a checksum behind it) write it."""
    data = film("mpegts", "libx264")
    before = 4 if packet == 192 else 0
    longer = b"".join(
        bytes(before) + data[at : at + 188] + bytes(packet - 188 - before) for at in range(0, len(data), 188)
    )
    assert numbers(decode_video(longer, LIMITS, 2)) == [0, 5, 10, 15]


@pytest.mark.parametrize("first", ["moov", "mdat", "wide", "free", "skip"])
def test_quicktime_without_a_file_type(first: str) -> None:
    """The boxes take the same places, so that the offsets in the index stay right."""
    data = film("mov", muxer={"movflags": "faststart"} if first == "moov" else {})
    kind, *others = boxes(data)
    unnamed = kind[:4] + (b"free" if first == "moov" else first.encode()) + kind[8:]
    if first == "moov":
        data = others[0] + unnamed + b"".join(others[1:])
    elif first == "mdat":
        data = (len(data) - len(others[-1])).to_bytes(4) + unnamed[4:] + b"".join(others)
    else:
        data = unnamed + b"".join(others)
    assert data[4:8] == first.encode()
    assert numbers(decode_video(data, LIMITS, 2)) == [0, 5, 10, 15]


CUT: dict[str, tuple[str, str, dict[str, str]]] = {
    "index last": ("mp4", "libx264", {}),
    "index first": ("mp4", "libx264", {"movflags": "faststart"}),
    "fragments": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "quicktime": ("mov", "libx264", {}),
    "avi": ("avi", "mpeg4", {}),
    "matroska": ("matroska", "libx264", {}),
    "webm": ("webm", "libvpx", {}),
}


@pytest.mark.parametrize("kind", CUT)
def test_a_file_that_was_cut_off_anywhere_is_said_to_be_incomplete(kind: str) -> None:
    form, codec, muxer = CUT[kind]
    data = film(form, codec, 6, muxer=muxer)
    said = set()
    for end in range(64, len(data), len(data) // 200):
        try:
            decode_video(data[:end], LIMITS)
        except ServeError as error:
            said.add((error.code, error.detail))
    assert {code for code, _ in said} == {"video_truncated"}
    sentence = r"the [\w/]+ video ends too early((, |: )[^:;]+)?; send the complete file"
    assert [text for _, text in said if not re.fullmatch(sentence, text) or " 1 frames" in text] == []
    assert any("its index (moov) is missing" in text for _, text in said) == (kind in ("index last", "quicktime"))
