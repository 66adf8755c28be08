"""The requests that measure a deployment, and the speeds that follow from their times.

Most are sent one at a time, so that nothing waits: the differences between their times to first token are the times of
the stages. Some are sent at once. They show how a step of the language model grows with its requests, and how much the
instances hinder each other on cores that they share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, median

import msgspec
import numpy as np

from .curve import Curve, fitted
from .deployment import Deployment
from .errors import MeasuringFailed
from .simulation import play
from .speeds import Speeds
from .workload import Asked

WORDS = (8, 200, 800)
"""Words of the prompts without pictures."""
PICTURE_TOKENS = (64, 256, 576, 1024)
ANSWER = 33
"""Tokens of the answers that time a step."""
TOGETHER = 8
"""Requests that are sent at once."""
BURST_ANSWER = 16
LOADS = [0.5 * 1.05**n for n in range(60)]
"""Loads that are tried, up to all cores."""


class Text(msgspec.Struct, frozen=True):
    """A prompt without pictures: its tokens, the time to first token, and the engine's part of that if it tells."""

    tokens: int
    ttft: float
    engine: float | None = None
    noise: float = 0.0


class Picture(msgspec.Struct, frozen=True):
    """A prompt with one picture.

    Attributes:
        visual: Visual tokens.
        tokens: Tokens of the whole prompt.
        ttft: Time to first token.
        engine: The engine's part of it, if an undivided engine tells.
        transfer: The transfer's part of it, if a router tells.
        noise: How far the time may be off, as a share of it.
    """

    visual: int
    tokens: int
    ttft: float
    engine: float | None = None
    transfer: float | None = None
    noise: float = 0.0


class Step(msgspec.Struct, frozen=True):
    """Seconds of a token of each of so many requests."""

    requests: int
    seconds: float


class Burst(msgspec.Struct, frozen=True):
    """Requests that were sent at once: what they asked, and the mean of their times to first token and to the end."""

    asked: tuple[Asked, ...]
    ttft: float
    latency: float
    noise: float = 0.0


class Times(msgspec.Struct, frozen=True):
    """All that was measured at one deployment."""

    deployment: Deployment
    texts: tuple[Text, ...]
    pictures: tuple[Picture, ...]
    steps: tuple[Step, ...]
    bursts: tuple[Burst, ...] = ()

    @property
    def noise(self) -> float:
        """How far the noisiest time may be off, as a share of it."""
        found = [*(one.noise for one in self.texts), *(one.noise for one in self.pictures)]
        return max([*found, *(one.noise for one in self.bursts)], default=0.0)


def noise(times: Sequence[float]) -> float:
    """Returns the standard error of the median of times of the same request, as a share of the median.

    It stands on the middle half of the times, so that single ones far off, which the median ignores too, count for
    nothing: for a normal distribution, 1.253 times its deviation, which is 0.741 of that half's width.
    """
    if len(times) < 2:
        return 0.0
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    return float(1.253 * 0.741 * (high - low) / max(middle, 1e-9) / math.sqrt(len(times)))


def merged(times: Sequence[Times]) -> Times:
    """Returns all that was measured at one deployment at several times."""
    return Times(
        times[0].deployment,
        tuple(text for one in times for text in one.texts),
        tuple(picture for one in times for picture in one.pictures),
        tuple(step for one in times for step in one.steps),
        tuple(burst for one in times for burst in one.bursts),
    )


def speeds(undivided: Times | None, split: Times | None, *, cores: float | None, source: str) -> Speeds:
    """Returns the speeds that explain the times.

    Args:
        undivided: Measured at an engine that encodes and answers.
        split: Measured at a router. Without it, splitting is taken to add nothing but what the user says of it.
        cores: Shared by all instances; None if each has a device of its own.
        source: For people.

    Raises:
        MeasuringFailed: the times are too few or contradict each other.
    """
    base = undivided or split
    if base is None or len(base.texts) < 2 or not base.pictures or not base.steps:
        raise MeasuringFailed("too few requests were answered to compute speeds; look at the server's log")
    step = fitted([(one.requests, one.seconds) for one in base.steps])
    text = fitted([(one.tokens, one.ttft) for one in base.texts])
    told = [one.engine - text.at(one.tokens) + text.base for one in base.texts if one.engine is not None]
    in_engine = min(text.base, max(step.base, median(told))) if told else min(text.base, step.base)
    request = text.base - in_engine
    prefill = Curve(in_engine - min(step.base, in_engine), text.each, text.square)
    front = [one for one in base.pictures if one.engine is not None]
    prepare = fitted(
        [(one.visual, one.ttft - (one.engine or 0.0) - request) for one in front], [one.ttft for one in front]
    )
    # Split, the prompt is prepared while the picture is, so its time is hidden.
    hidden = 0.0 if undivided is not None else request
    alone = [(one, text.at(one.tokens) + prepare.at(one.visual) + (one.transfer or 0.0)) for one in base.pictures]
    encode = fitted(
        [(one.visual, max(1e-6, one.ttft - rest + hidden)) for one, rest in alone], [one.ttft for one, _ in alone]
    )
    found = Speeds(
        encode=encode,
        prefill=prefill,
        step=step,
        prepare=prepare,
        request=request,
        cores=cores,
        source=source,
        noise=max(one.noise for one in (undivided, split) if one is not None),
    )
    if split is not None:
        found = _with_split(found, undivided, split)
    found.check()
    return _with_loads(found, undivided, split)


def _with_split(found: Speeds, undivided: Times | None, split: Times) -> Speeds:
    """Adds what splitting adds."""
    if undivided is None:
        moved = [(one.visual, one.transfer) for one in split.pictures if one.transfer is not None]
        return msgspec.structs.replace(found, handover=fitted(moved))
    fewest = min(one.tokens for one in split.texts)
    shortest = median(one.ttft for one in split.texts if one.tokens == fewest)
    step = fitted([(one.requests, one.seconds) for one in split.steps])
    more = max(0.0, shortest - found.request - step.base - found.prefill.at(fewest))
    points = []
    for one in split.pictures:
        before = max(found.request, found.prepare.at(one.visual) + found.encode.at(one.visual))
        points.append((one.visual, one.ttft - more - before - step.base - found.prefill.at(one.tokens)))
    handover = fitted(points, [one.ttft for one in split.pictures])
    return msgspec.structs.replace(found, split_request=more, split_step=step, handover=handover)


def _with_loads(found: Speeds, undivided: Times | None, split: Times | None) -> Speeds:
    """Adds how many cores a busy instance fills: the number with which the bursts take as long as they took."""
    if found.cores is None:
        return found
    loads: dict[str, float] = {}
    tried = [load for load in LOADS if load <= found.cores]
    for name, times in (("load", undivided), ("split_load", split)):
        if times is not None and times.bursts:
            loads[name] = min(tried, key=lambda load: _error(_replaced(found, name, load), times))
    for name, other in (("load", "split_load"), ("split_load", "load")):
        if other in loads:
            loads.setdefault(name, loads[other])
    return msgspec.structs.replace(found, **loads)


def _replaced(found: Speeds, name: str, load: float) -> Speeds:
    return msgspec.structs.replace(found, **{name: load})


def _error(found: Speeds, times: Times) -> float:
    """Returns how far the plays of the bursts are from what was measured."""
    errors = []
    for burst in times.bursts:
        outcome = play(burst.asked, times.deployment, found)
        ttft = mean(one.first - one.began for one in outcome.requests)
        latency = mean(one.ended - one.began for one in outcome.requests)
        errors += [math.log(ttft / burst.ttft) ** 2, math.log(latency / burst.latency) ** 2]
    return mean(errors)


def sizes(tokens: Sequence[int], largest: int) -> list[int]:
    """Returns the visual tokens of the pictures to measure: those given, as far as the model has pictures so large."""
    return sorted({min(one, largest) for one in tokens})
