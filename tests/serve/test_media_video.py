"""Videos: the sampled frames, and the code of each refusal."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.video import check_frames, check_video, decode_frames, decode_video
from tests.serve import pictures

LIMITS = MediaSettings()
TWO_SECONDS = pictures.video(20, 10)


def greys(frames: list[Image.Image]) -> list[int]:
    """Returns the numbers of the sampled frames, by their brightness."""
    return [round(float(np.asarray(frame).mean()) / 10) for frame in frames]


def refusal(call: object, *arguments: object) -> str:
    with pytest.raises(ServeError) as caught:
        call(*arguments)  # type: ignore[operator]
    assert 400 <= caught.value.http_status < 500
    return caught.value.code


@pytest.mark.parametrize(
    ("fps", "numbers", "rate"),
    [
        (2, [0, 5, 10, 15], 2),
        (5, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18], 5),
        (10, list(range(20)), 10),
        (60, list(range(20)), 10),
        (0.5, [0], 0.5),
        (0.1, [0], 0.1),
    ],
)
def test_frames_are_sampled_at_the_requested_rate_but_none_twice(fps: float, numbers: list[int], rate: float) -> None:
    taken = decode_video(TWO_SECONDS, LIMITS, fps)
    assert greys(taken.frames) == numbers
    assert taken.fps == pytest.approx(rate)
    assert {frame.mode for frame in taken.frames} == {"RGB"}
    assert {frame.size for frame in taken.frames} == {(64, 48)}


def test_a_long_video_is_sampled_evenly_up_to_the_limit() -> None:
    taken = decode_video(TWO_SECONDS, MediaSettings(max_video_frames=4), 10)
    assert (greys(taken.frames), taken.fps) == ([0, 5, 10, 15], 2)


def test_the_default_rate_is_a_setting() -> None:
    assert greys(decode_video(TWO_SECONDS, MediaSettings(video_fps=1)).frames) == [0, 10]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi"])
def test_each_container_is_decoded(suffix: str) -> None:
    data = pictures.video(20, 10, suffix=suffix)
    header = check_video(data, LIMITS)
    assert (header.width, header.height, header.count) == (64, 48, 20)
    assert header.seconds == pytest.approx(2, abs=0.11)
    assert greys(decode_video(data, LIMITS, 2).frames)[:3] == [0, 5, 10]


def test_an_animated_gif_is_a_video() -> None:
    taken = decode_video(pictures.gif(4), LIMITS, 10)
    assert len(taken.frames) == 4
    assert taken.fps == pytest.approx(10)


FAULTS = {
    "nothing": (b"", LIMITS, "media_empty"),
    "a picture": (pictures.png(), LIMITS, "wrong_media_kind"),
    "random bytes": (np.random.default_rng(2).bytes(3000), LIMITS, "unsupported_media_type"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", LIMITS, "unsupported_media_type"),
    "index cut off": (TWO_SECONDS[:-400], LIMITS, "video_truncated"),
    "signature only": (TWO_SECONDS[:24], LIMITS, "video_truncated"),
    "pictures cut off": (pictures.video(40, 10, index_first=True)[:-800], LIMITS, "video_truncated"),
    "matroska cut off": (pictures.video(40, 10, suffix=".mkv")[:2000], LIMITS, "video_truncated"),
    "noise after a signature": (b"\0\0\0\x18ftypisom" + np.random.default_rng(4).bytes(900), LIMITS, "video_truncated"),
    "an empty index": (b"\0\0\0\x10ftypisom\0\0\0\0\0\0\0\x20moov" + bytes(24), LIMITS, "video_corrupt"),
    "cut inside the index": (pictures.video(4)[:-300], LIMITS, "video_truncated"),
    "too many bytes": (TWO_SECONDS, MediaSettings(max_bytes=1000), "media_too_large"),
    "too long": (TWO_SECONDS, MediaSettings(max_video_seconds=1), "video_too_long"),
    "too wide": (TWO_SECONDS, MediaSettings(max_side=50), "media_side_too_long"),
    "too many pixels a frame": (TWO_SECONDS, MediaSettings(max_pixels=3000), "media_too_many_pixels"),
    "too many pixels in all": (TWO_SECONDS, MediaSettings(max_video_pixels=10_000), "media_too_many_pixels"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_video_is_refused(name: str) -> None:
    data, limits, code = FAULTS[name]
    assert refusal(check_video, data, limits) == code
    assert refusal(decode_video, data, limits) == code


def test_a_flipped_byte_gives_frames_or_a_refusal() -> None:
    rng = np.random.default_rng(5)
    refused = []
    for at in rng.integers(0, len(TWO_SECONDS), 60).tolist():
        damaged = bytearray(TWO_SECONDS)
        damaged[at] ^= int(rng.integers(1, 256))
        try:
            assert decode_video(bytes(damaged), LIMITS, 5).frames
        except ServeError as error:
            refused.append(error.http_status)
    assert refused
    assert {400 <= status < 500 for status in refused} == {True}


def test_a_list_of_frames_is_decoded() -> None:
    frames = [pictures.png(20, 10, colour) for colour in ("red", "lime", "blue")]
    taken = decode_frames(frames, 1.5, LIMITS)
    assert [frame.getpixel((0, 0)) for frame in taken.frames] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert taken.fps == 1.5


def test_a_bad_list_of_frames_is_refused() -> None:
    frame = pictures.png()
    assert refusal(check_frames, [], LIMITS) == "media_empty"
    assert refusal(check_frames, [frame] * 3, MediaSettings(max_video_frames=2)) == "too_many_frames"
    assert refusal(check_frames, [frame, pictures.png(8, 8)], LIMITS) == "video_frame_sizes"
    assert refusal(check_frames, [frame, b"junk"], LIMITS) == "unsupported_media_type"
    assert refusal(check_frames, [frame] * 3, MediaSettings(max_video_pixels=700)) == "media_too_many_pixels"
    assert refusal(decode_frames, [frame], 0.0, LIMITS) == "invalid_request"
