"""Requests of a workload: their pictures and times. The same plan gives the same requests on every machine.

Sizes and numbers of pictures are drawn in strata: of ``n`` draws, one lies in each ``n``-th of the distribution, in
random order. So twenty requests have the same median and tail as twenty thousand.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

import msgspec
import numpy as np

IMAGE_TOKENS = ((0.0, 64), (0.5, 405), (0.9, 1224), (1.0, 1280))
"""Share of pictures, and the most visual tokens they have; the logarithm is interpolated linearly."""

IMAGES = {1: 0.62, 2: 0.18, 3: 0.12, 4: 0.03, 5: 0.015, 6: 0.01, 7: 0.005, 8: 0.005, 9: 0.015}
"""Share of requests by number of pictures: 1, 3 and 9 at the quantiles 0.5, 0.9 and 0.99."""

LARGEST = IMAGE_TOKENS[-1][1]
ASPECT = 2.0
"""The largest ratio of a picture's sides."""


LEAST_RATE, LEAST_CV, MOST_CV = 1e-6, 0.001, 1000.0
"""Beyond them, times between requests are lost in rounding: a clock counts seconds from the first request."""
CV_RANGE = f"0, or from {LEAST_CV:g} to {MOST_CV:g}"

GRAIN = 7
"""Pixels a side of a square of one colour. No two patches are alike, and the file is as large as that of a photograph
(0.15 MB for 1,280 tokens)."""


class Picture(msgspec.Struct, frozen=True):
    """A picture or video whose pixels are made from ``key``; width and height are in pixels."""

    key: tuple[int, int]
    width: int
    height: int
    tokens: int
    """Visual tokens."""
    cut_short: bool = False
    """True for a file that ends in its middle."""
    frames: int = 0
    """Frames of a video; 0 for a picture."""


class Request(msgspec.Struct, frozen=True):
    number: int
    at: float
    """Seconds after the first one."""
    pictures: tuple[Picture, ...]
    repeated: int = 0
    """How many of the pictures an earlier request had."""
    rid: str = ""
    """The id that the client gives it, in SGLang's field of that name; empty for none."""

    @property
    def image_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)


class Plan(msgspec.Struct, frozen=True):
    """Parameters of a workload."""

    requests: int = 100
    rate: float | None = 1.0
    """Requests a second, on average; None sends all at once."""
    burstiness_cv: float = 1.0
    """Coefficient of variation of the gamma-distributed gaps between requests: 1 is a Poisson process, 4.9 is bursty, 0
    is a clock."""
    repeated: float = 0.0
    """Share of pictures that were sent before."""
    seed: int = 0
    side: int = 28
    """Pixels a side of the square that becomes one visual token: 28 for Qwen2.5-VL, 32 for Qwen3-VL."""
    max_images: int = max(IMAGES)
    """Requests that would have more pictures have this many."""
    max_image_tokens: int = LARGEST
    """Pictures that would have more visual tokens have at most this many."""

    def check(self) -> None:
        """Checks the parameters.

        Raises:
            ValueError: one of them is out of range; the text says which.
        """
        wrong = {
            "requests: at least 1": self.requests < 1,
            f"rate: at least {LEAST_RATE:g}, at most a million": not is_rate(self.rate),
            f"coefficient of variation: {CV_RANGE}": not is_cv(self.burstiness_cv),
            "repeated: between 0 and 0.8": not 0 <= self.repeated <= 0.8,
            "seed: at least 0": self.seed < 0,
            "side: at least 1 pixel": self.side < 1,
            "pictures a request: at least 1": self.max_images < 1,
            "visual tokens a picture: at least 4": self.max_image_tokens < 4,
        }
        for rule, broken in wrong.items():
            if broken:
                raise ValueError(rule)


def is_rate(rate: float | None) -> bool:
    """Returns whether requests can come at this rate."""
    return rate is None or LEAST_RATE <= rate <= 1e6


def is_cv(cv: float) -> bool:
    """Returns whether gaps can have this coefficient of variation."""
    return cv == 0 or LEAST_CV <= cv <= MOST_CV


@cache
def url(picture: Picture) -> str:
    """Returns the picture as the ``data:`` URL of a PNG, a video as that of its frames in JPEG."""
    chance = np.random.default_rng(picture.key)
    if picture.frames:
        frames = (_file(picture, chance, "JPEG") for _ in range(picture.frames))
        return "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    content = _file(picture, chance, "PNG")
    if picture.cut_short:
        content = content[: len(content) // 2]
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _file(picture: Picture, chance: np.random.Generator, kind: str) -> bytes:
    from PIL import Image

    rows, columns = -(-picture.height // GRAIN), -(-picture.width // GRAIN)
    colours = chance.integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    pixels = colours.repeat(GRAIN, 0).repeat(GRAIN, 1)[: picture.height, : picture.width]
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, kind, compress_level=1)
    return data.getvalue()


def requests(plan: Plan) -> list[Request]:
    """Returns the requests in the order of their times.

    Raises:
        ValueError: a parameter of the plan is out of range.
    """
    plan.check()
    # A generator each, so that another rate or another share of repeats does not change the rest.
    for_gaps, for_counts, for_sizes, for_repeats = np.random.default_rng(plan.seed).spawn(4)
    counts = [min(image_count(u), plan.max_images) for u in _strata(plan.requests, for_counts)]
    repeats = _repeats(counts, plan.repeated, for_repeats)
    pictures = _pictures(plan, sum(counts) - sum(repeats), for_sizes)
    made: list[Request] = []
    sent: list[Picture] = []
    for number, (at, count, wanted) in enumerate(zip(arrivals(plan, for_gaps), counts, repeats, strict=True)):
        again = min(wanted, len(sent))
        chosen = [sent[i] for i in for_repeats.choice(len(sent), again, replace=False)] if again else []
        fresh = [next(pictures) for _ in range(count - again)]
        sent += fresh
        made.append(Request(number, at, (*chosen, *fresh), again))
    return made


def arrivals(plan: Plan, chance: np.random.Generator) -> list[float]:
    """Returns the times of all requests, seconds after the first. The gaps add up to the rate, as in vLLM's bench."""
    if plan.rate is None:
        return [0.0] * plan.requests
    cv = plan.burstiness_cv
    gaps = np.full(plan.requests, 1.0) if cv == 0 else chance.gamma(1 / cv**2, cv**2, plan.requests)
    if not gaps.sum():  # so uneven that all were rounded to 0
        gaps[0] = 1.0
    gaps *= plan.requests / plan.rate / gaps.sum()
    times: list[float] = np.cumsum(gaps).tolist()
    return [at - times[0] for at in times]


def image_count(share: float) -> int:
    """Returns the number of pictures at a quantile."""
    total = 0.0
    for count, mass in IMAGES.items():
        total += mass
        if share <= total + 1e-12:
            return count
    return max(IMAGES)


def image_tokens(share: float) -> int:
    """Returns the visual tokens of the picture at a quantile, rounded to a number that is a grid."""
    for (below, low), (above, high) in pairwise(IMAGE_TOKENS):
        if share <= above:
            exact = math.exp(math.log(low) + (share - below) / (above - below) * math.log(high / low))
            return nearest_grid(exact)
    return LARGEST


def nearest_grid(tokens: float) -> int:
    """Returns the nearest number of tokens that has a :func:`grid`; the larger of two."""
    return min(_grids(), key=lambda n: (abs(n - tokens), -n))


def grid(tokens: int) -> tuple[int, int] | None:
    """Returns the two most equal sides whose product is ``tokens``, the shorter first; None if they differ too much."""
    for short in range(math.isqrt(tokens), 0, -1):
        if tokens % short == 0:
            return (short, tokens // short) if tokens // short <= ASPECT * short else None
    return None


class Drawn(msgspec.Struct, frozen=True):
    """Statistics of the requests that were drawn."""

    requests: int
    pictures: int
    distinct: int
    repeated: float
    """Share of pictures that an earlier request had."""
    tokens: tuple[float, float, float]
    """Visual tokens a picture: median, 90th percentile, largest."""
    images: tuple[float, float, float]
    """Pictures a request: 50th, 90th and 99th percentile."""
    cv: float | None
    """Coefficient of variation of the gaps; None if there are none."""


def drawn(made: list[Request]) -> Drawn:
    sizes = [picture.tokens for request in made for picture in request.pictures]
    counts = [len(request.pictures) for request in made]
    gaps = np.diff([request.at for request in made])
    return Drawn(
        requests=len(made),
        pictures=len(sizes),
        distinct=len({picture.key for request in made for picture in request.pictures}),
        repeated=sum(request.repeated for request in made) / len(sizes),
        tokens=(*np.quantile(sizes, (0.5, 0.9)).tolist(), max(sizes)),
        images=tuple(np.quantile(counts, (0.5, 0.9, 0.99)).tolist()),
        cv=float(gaps.std() / gaps.mean()) if gaps.size and gaps.mean() > 0 else None,
    )


@cache
def _grids() -> tuple[int, ...]:
    return tuple(n for n in range(4, LARGEST + 1) if grid(n))


def _strata(n: int, chance: np.random.Generator) -> list[float]:
    """Returns ``n`` quantiles, the middle of each ``n``-th, in random order."""
    shares: list[float] = ((chance.permutation(n) + 0.5) / n).tolist()
    return shares


def _repeats(counts: list[int], share: float, chance: np.random.Generator) -> list[int]:
    """Returns how many pictures of each request were sent before; none of the first request's."""
    owner = np.repeat(np.arange(len(counts)), counts)
    later = owner[counts[0] :]
    wanted = min(round(share * owner.size), later.size)
    places = chance.choice(later, wanted, replace=False) if wanted else later[:0]
    found: list[int] = np.bincount(places, minlength=len(counts)).tolist()
    return found


def _pictures(plan: Plan, distinct: int, chance: np.random.Generator) -> Iterator[Picture]:
    """Yields the planned number of pictures in strata, then random ones for requests that found too few to repeat."""
    shares = _strata(distinct, chance)
    index = 0
    while True:
        share = shares[index] if index < distinct else float(chance.random())
        tokens = image_tokens(share)
        if tokens > plan.max_image_tokens:
            tokens = max(n for n in _grids() if n <= plan.max_image_tokens)
        sides = grid(tokens)
        assert sides is not None  # image_tokens returns only grids
        width, height = sides if index % 2 else sides[::-1]
        yield Picture((plan.seed, index), width * plan.side, height * plan.side, tokens)
        index += 1
