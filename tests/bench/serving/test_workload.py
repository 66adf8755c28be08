"""The workload has the distributions that its documentation promises, with few requests as with many."""

from __future__ import annotations

import base64
import io
import math
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from PIL import Image

from embferry.bench.serving.workload import (
    IMAGES,
    LARGEST,
    Picture,
    Plan,
    Request,
    arrivals,
    drawn,
    grid,
    image_count,
    image_tokens,
    requests,
    url,
)


def sizes(made: list[Request]) -> list[int]:
    return [picture.tokens for request in made for picture in request.pictures]


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_the_documented_ones(seed: int) -> None:
    made = requests(Plan(requests=2000, seed=seed))
    tokens, counts = sizes(made), [len(request.pictures) for request in made]
    assert np.quantile(tokens, 0.5) == 405
    assert np.quantile(tokens, 0.9) == pytest.approx(1224, abs=2)
    assert (min(tokens), max(tokens)) == (pytest.approx(64, abs=1), 1280)
    assert [np.quantile(counts, share) for share in (0.5, 0.9, 0.99)] == [1, 3, 9]


def test_few_requests_have_the_same_median_and_tail() -> None:
    facts = drawn(requests(Plan(requests=24, seed=1)))
    assert facts.tokens[0] == pytest.approx(405, rel=0.05)
    assert facts.tokens[1] == pytest.approx(1224, rel=0.05)
    assert facts.tokens[2] == pytest.approx(1280, rel=0.05)
    assert facts.images[:2] == (1, 3)


def test_the_table_of_picture_counts_has_its_quantiles() -> None:
    assert math.isclose(sum(IMAGES.values()), 1)
    assert [image_count(share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 1, 3, 9, 9]
    assert [image_tokens(share) for share in (0.0, 0.5, 0.9, 1.0)] == [64, 405, 1224, 1280]


def test_the_pixels_of_a_picture_give_exactly_its_tokens() -> None:
    for side in (28, 32):
        for request in requests(Plan(requests=200, side=side)):
            for picture in request.pictures:
                assert (picture.width % side, picture.height % side) == (0, 0)
                assert (picture.width // side) * (picture.height // side) == picture.tokens
                assert max(picture.width, picture.height) <= 2 * min(picture.width, picture.height)


def test_a_grid_has_the_most_equal_sides() -> None:
    assert grid(1224) == (34, 36)
    assert grid(405) == (15, 27)
    assert grid(1280) == (32, 40)
    assert grid(13) is None


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.9])
def test_gaps_have_the_coefficient_of_variation(cv: float) -> None:
    gaps = np.diff(arrivals(Plan(requests=300_000, burstiness_cv=cv), np.random.default_rng(0)))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


@pytest.mark.parametrize("cv", [0.0, 1.0, 4.9])
def test_gaps_add_up_to_the_rate(cv: float) -> None:
    made = requests(Plan(requests=1000, rate=4.0, burstiness_cv=cv))
    assert made[0].at == 0
    assert made[-1].at <= 250
    assert all(one.at <= other.at for one, other in pairwise(made))
    if cv == 0:
        assert made[-1].at == pytest.approx(249.75)


def test_without_a_rate_all_are_sent_at_once() -> None:
    made = requests(Plan(requests=10, rate=None))
    assert {request.at for request in made} == {0.0}
    assert drawn(made).cv is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_the_share_of_pictures_was_sent_before(share: float) -> None:
    made = requests(Plan(requests=2000, repeated=share))
    sent: set[tuple[int, int]] = set()
    again = 0
    for request in made:
        keys = [picture.key for picture in request.pictures]
        assert len(set(keys)) == len(keys)
        assert sum(key in sent for key in keys) == request.repeated
        again += request.repeated
        sent.update(keys)
    assert again / len(sizes(made)) == pytest.approx(share, abs=0.01)
    assert drawn(made).repeated == again / len(sizes(made))


def test_the_same_plan_gives_the_same_requests_and_another_seed_others() -> None:
    plan = Plan(requests=50, repeated=0.5, seed=3)
    assert requests(plan) == requests(plan)
    assert requests(plan) != requests(msgspec.structs.replace(plan, seed=4))


def test_another_rate_does_not_change_the_pictures() -> None:
    plan = Plan(requests=50, repeated=0.5)
    other = msgspec.structs.replace(plan, rate=9.0, burstiness_cv=4.9)
    assert [request.pictures for request in requests(plan)] == [request.pictures for request in requests(other)]


def test_no_request_passes_the_caps() -> None:
    made = requests(Plan(requests=500, max_images=2, max_image_tokens=300))
    assert max(len(request.pictures) for request in made) == 2
    assert 250 < max(sizes(made)) <= 300
    assert max(sizes(requests(Plan(requests=500)))) == LARGEST


@pytest.mark.parametrize(
    "wrong",
    [
        {"requests": 0},
        {"rate": 0.0},
        {"rate": math.nan},
        {"rate": math.inf},
        {"burstiness_cv": -1.0},
        {"repeated": 0.9},
        {"seed": -1},
        {"side": 0},
        {"max_images": 0},
        {"max_image_tokens": 3},
    ],
)
def test_a_plan_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        requests(Plan(**wrong))  # type: ignore[arg-type]  # the table has several types


def test_a_picture_is_made_from_its_key() -> None:
    one, other = Picture((1, 0), 84, 112, 12), Picture((1, 1), 84, 112, 12)
    assert url(one) == url(one) != url(other)
    image = Image.open(io.BytesIO(base64.b64decode(url(one).partition(",")[2])))
    assert (image.format, image.size) == ("PNG", (84, 112))
    pixels = np.asarray(image)
    patches = {pixels[y : y + 28, x : x + 28].tobytes() for y in range(0, 112, 28) for x in range(0, 84, 28)}
    assert len(patches) == 12


def test_a_picture_that_is_cut_short_cannot_be_read() -> None:
    picture = Picture((1, 2), 224, 168, 48)
    cut = base64.b64decode(url(msgspec.structs.replace(picture, cut_short=True)).partition(",")[2])
    assert base64.b64decode(url(picture).partition(",")[2]).startswith(cut)
    with Image.open(io.BytesIO(cut)) as opened, pytest.raises(OSError, match="truncated"):
        opened.load()


def test_a_video_is_sent_as_its_frames() -> None:
    kind, _, frames = url(Picture((7, 0), 56, 28, 2, frames=3)).partition(",")
    assert kind == "data:video/jpeg;base64"
    read = [Image.open(io.BytesIO(base64.b64decode(frame))) for frame in frames.split(",")]
    assert [(each.format, each.size) for each in read] == [("JPEG", (56, 28))] * 3
    assert len({each.tobytes() for each in read}) == 3
