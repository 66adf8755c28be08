"""Pictures and videos become patches: the same as transformers makes, of a number known beforehand."""

from __future__ import annotations

import io
import math
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from embferry.engine.errors import CheckpointError, MediaError
from embferry.engine.media import MAX_ASPECT_RATIO, MediaProcessor, Video, patchify
from tests.engine.tiny import MERGE, PATCH, picture, video

SIZES = [(64, 64), (1, 1), (3, 500), (500, 3), (17, 90), (640, 480), (33, 31)]


@pytest.fixture(scope="module")
def media(model_dir) -> MediaProcessor:
    return MediaProcessor.load(model_dir("qwen3_vl"), b"weights")


def all_families(model_dir):
    return [MediaProcessor.load(model_dir(name)) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]


@pytest.mark.parametrize("size", SIZES)
def test_patches_of_a_picture_equal_those_of_transformers(model_dir, media, size):
    theirs = Qwen2VLImageProcessorPil.from_pretrained(model_dir("qwen3_vl"))(picture(1, *size), return_tensors="pt")
    ours = media.prepare(picture(1, *size))
    assert torch.equal(ours.pixel_values, theirs["pixel_values"])
    assert ours.grid_thw == tuple(theirs["image_grid_thw"][0].tolist())
    assert ours.num_tokens == ours.pixel_values.shape[0] // MERGE**2 == media.tokens_of(size)


SETTINGS = {
    "packaged": (8, 12_288, 16_384, (0.5, 0.5, 0.5)),
    "Qwen2-VL": (14, 56 * 56, 28 * 28 * 16_384, (0.48145466, 0.4578275, 0.40821073)),
    "Qwen2-VL, few pixels": (14, 56 * 56, 28 * 28 * 64, (0.48145466, 0.4578275, 0.40821073)),
    "Qwen2.5-VL": (14, 56 * 56, 28 * 28 * 16_384, (0.48145466, 0.4578275, 0.40821073)),
    "Qwen3-VL": (16, 65_536, 16_777_216, (0.5, 0.5, 0.5)),
    "Qwen3-VL, few pixels": (16, 65_536, 131_072, (0.5, 0.5, 0.5)),
}
"""Patch, fewest and most pixels, and the mean colour of the settings with which models are published."""
ELONGATED = [(50, 1000), (424, 59), (59, 424), (1000, 20_000), (30, 6000), (32_768, 200), (1, 200), (4, 800)]


def processor_of(patch: int, least: int, most: int, mean: tuple[float, ...]) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, size={"shortest_edge": least, "longest_edge": most}, image_mean=list(mean)
    )


def random_sizes(seed: int, count: int, most: int) -> list[tuple[int, int]]:
    """Returns sizes of all shapes that are allowed, of at most ``most`` pixels."""
    random = np.random.default_rng(seed)
    sizes = []
    while len(sizes) < count:
        area, ratio = np.exp(random.uniform(0, np.log(most))), np.exp(random.uniform(-1, 1) * np.log(MAX_ASPECT_RATIO))
        width, height = max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))
        if max(width, height) <= MAX_ASPECT_RATIO * min(width, height):
            sizes.append((width, height))
    return sizes


@pytest.mark.parametrize("name", SETTINGS)
def test_every_size_becomes_the_patches_that_transformers_makes(model_dir, name):
    """The size that a model takes is not always one that it leaves as it is."""
    theirs = processor_of(*SETTINGS[name])
    media = MediaProcessor(MediaProcessor.load(model_dir("qwen3_vl")).family, theirs, {})
    for number, size in enumerate([*ELONGATED[:3], *ELONGATED[-2:], *random_sizes(1, 60, 300_000)]):
        image = picture(number, *size)
        expected = theirs(image, return_tensors="pt")
        ours = media.prepare(image)
        assert ours.grid_thw == tuple(expected["image_grid_thw"][0].tolist()), size
        assert torch.equal(ours.pixel_values, expected["pixel_values"]), size


@pytest.mark.parametrize("size", ELONGATED)
def test_a_picture_of_any_allowed_shape_is_read(model_dir, size):
    theirs = processor_of(*SETTINGS["packaged"])
    media = MediaProcessor(MediaProcessor.load(model_dir("qwen3_vl")).family, theirs, {})
    image = Image.new("RGB", size, "red")
    ours, expected = media.prepare(image), theirs(image, return_tensors="pt")
    assert torch.equal(ours.pixel_values, expected["pixel_values"])
    assert ours.grid_thw == tuple(expected["image_grid_thw"][0].tolist()) == media.grid_of(size)


@pytest.mark.parametrize("size", [(640, 480), (500, 3), (33, 31), (50, 1000)])
def test_a_picture_has_the_size_of_the_model_before_it_is_copied(media, monkeypatch, size):
    """The image processor keeps several copies of what it gets: of 64 megapixels they took 1.8 GB."""
    seen = []
    make = type(media._images).preprocess
    monkeypatch.setattr(
        type(media._images),
        "preprocess",
        lambda self, image, **more: (seen.append(image.size), make(self, image, **more))[1],
    )
    _, height, width = media.prepare(picture(1, *size)).grid_thw
    assert seen == [(PATCH * width, PATCH * height)]


@pytest.mark.parametrize("name", ["packaged", "Qwen3-VL"])
@pytest.mark.parametrize("item", [picture(1, 1000, 700), picture(1, 40, 300), video(1, 9, 320, 200), video(1, 1)])
def test_what_cutting_into_patches_takes_is_known_beforehand(model_dir, name, item):
    media = MediaProcessor(MediaProcessor.load(model_dir("qwen3_vl")).family, processor_of(*SETTINGS[name]), {})
    media.prepare(item)
    tracemalloc.start()
    try:
        kept = media.prepare(item).pixel_values.nbytes  # torch's own memory is not traced
        peak = tracemalloc.get_traced_memory()[1] + kept
    finally:
        tracemalloc.stop()
    assert peak / 3 < media.working_bytes(item)
    assert peak < media.working_bytes(item) + (1 << 16), "and some objects of Python"


def test_a_video_of_one_frame_equals_the_picture(model_dir):
    media = MediaProcessor.load(model_dir("qwen2_vl"))
    still = picture(2, 64, 48)
    frames = np.stack([media._pixels(still, (48, 64))] * 2)
    assert np.array_equal(patchify(frames, PATCH, 2, MERGE), media.prepare(still).pixel_values.numpy())
    assert torch.equal(media.prepare(Video([still], 1.0)).pixel_values, media.prepare(still).pixel_values)


def test_patches_are_ordered_by_time_then_block():
    count, height, width = 4, 32, 32
    ids = np.arange(count * height * width, dtype=np.float32).reshape(count, 1, height, width)
    rows = patchify(ids, PATCH, 2, MERGE)
    assert rows.shape == (2 * 4 * 4, 2 * PATCH * PATCH)
    corners = [
        (t, y, x) for t in (0, 2) for by in (0, 16) for bx in (0, 16) for y in (by, by + 8) for x in (bx, bx + 8)
    ]
    assert [int(row[0]) for row in rows] == [t * height * width + y * width + x for t, y, x in corners]
    assert int(rows[0][PATCH * PATCH]) == height * width, "the second frame of a temporal patch follows the first"


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
def test_the_tokens_of_a_video_are_known_from_its_size(model_dir, frames):
    for media in all_families(model_dir):
        prepared = media.prepare(video(3, frames, 90, 40))
        assert prepared.num_tokens == media.tokens_of((90, 40), frames)
        assert prepared.grid_thw[0] == (frames + 1) // 2
        assert prepared.pixel_values.shape == (prepared.num_tokens * MERGE**2, 3 * 2 * PATCH * PATCH)


def test_an_odd_video_repeats_its_last_frame(media):
    odd = video(3, 3)
    even = Video([*odd.frames, odd.frames[-1]], odd.fps)
    assert torch.equal(media.prepare(odd).pixel_values, media.prepare(even).pixel_values)


def test_timestamps_follow_the_rule_of_the_family(model_dir):
    two, two5, three = (media.prepare(video(3, 5, fps=2.0)).timestamps for media in all_families(model_dir))
    assert two == ()
    assert two5 == (0.0, 1.0, 2.0)
    assert three == (0.25, 1.25, 2.0)


def test_the_digest_depends_on_pixels_kind_and_weights(model_dir, media):
    still, other = picture(4), picture(4)
    first = media.prepare(still)
    assert first.digest == media.prepare(other).digest
    pixel = other.getpixel((0, 0))
    other.putpixel((0, 0), (pixel[0] ^ 1, *pixel[1:]))
    digests = [first.digest, media.prepare(other).digest]
    digests.append(MediaProcessor.load(model_dir("qwen3_vl"), b"other weights").prepare(still).digest)
    digests.append(media.prepare(Video([still], 1.0)).digest)
    assert len(set(digests)) == 4
    assert {len(digest) for digest in digests} == {16}


def test_a_transparent_picture_gets_a_white_background(media):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert torch.equal(
        media.prepare(clear).pixel_values, media.prepare(Image.new("RGB", (64, 64), "white")).pixel_values
    )


def test_frame_sampling_has_defaults(media):
    assert (media.frame_sampling.fps, media.frame_sampling.min_frames, media.frame_sampling.max_frames) == (2.0, 4, 768)


def truncated() -> Image.Image:
    file = io.BytesIO()
    picture(1, 200, 200).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:5000]))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (Image.new("RGB", (0, 10)), "at least one pixel"),
        (Image.new("RGB", (1, 1000)), "200 times"),
        (truncated(), "cannot be decoded"),
        (Video([], 1.0), "no frames"),
        (Video([picture(1)], 0.0), "positive number"),
        (Video([picture(1)], float("nan")), "positive number"),
        (Video([picture(1)] * 5, 5e-324), "seconds"),
        (Video([picture(1)] * 5, 1e-300), "seconds"),
        (Video([picture(1, 8, 8), picture(1, 8, 9)], 1.0), "one size"),
        ("picture.png", "expected a PIL image"),
    ],
)
def test_bad_media_is_rejected(media, item, message):
    with pytest.raises(MediaError, match=message):
        media.prepare(item)


def test_missing_preprocessor_settings_are_rejected(model_dir, tmp_path):
    (tmp_path / "config.json").write_text((model_dir("qwen2_vl") / "config.json").read_text())
    with pytest.raises(CheckpointError, match="preprocessor settings"):
        MediaProcessor.load(tmp_path)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (20, 20)])
def test_the_size_of_a_video_follows_the_rule_of_transformers(model_dir, size, capped):
    """Computes the rule of the Qwen3-VL video processor anew, because its class needs torchvision."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    media = MediaProcessor.load(model_dir("qwen3_vl"))
    limits, frames = media._limits, 6
    most = limits.max_pixels
    settings = {"cap_pixels_per_frame": capped, "max_video_tokens": 16, "size": media._video["size"]}
    if capped:
        most = max(min(16 * 16 * 16, most // frames), int(limits.min_pixels * 1.05)) * frames
    rows, columns = smart_resize(frames, size[1], size[0], 2, 16, limits.min_pixels, most)
    capped_media = MediaProcessor(media.family, media._images, settings)
    assert capped_media.grid_of(size, frames) == (3, rows // PATCH, columns // PATCH)
