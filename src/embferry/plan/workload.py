"""The requests for which to plan, with the arrivals of ``embferry bench serve``."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np

from embferry.bench.serving.workload import CV_RANGE, LEAST_RATE, Plan, arrivals, is_cv, is_rate

from .errors import WorkloadInvalid

MOST_STEPS = 2_000_000
"""Tokens of all answers; more would take minutes to play through."""
MOST_PICTURES = 1_000_000
"""The same for all pictures: twice those of the usual number of requests with the most pictures each."""


class Asked(msgspec.Struct, frozen=True):
    """One request: seconds after the first one, visual tokens of each picture, tokens of text and of the answer."""

    at: float
    pictures: tuple[int, ...]
    text_tokens: int
    output_tokens: int

    @property
    def visual_tokens(self) -> int:
        return sum(self.pictures)

    @property
    def prompt_tokens(self) -> int:
        return self.visual_tokens + self.text_tokens


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of users.

    Attributes:
        pictures: Visual tokens of pictures, which are taken in turn, over all pictures of all requests.
        images: Pictures of a request; None for one of each.
        rate: Requests a second, on average.
        burstiness_cv: Coefficient of variation of the gaps: 1 is a Poisson process, 4.9 bursty, 0 a clock.
        text_tokens: Tokens of the prompt beside the pictures.
        output_tokens: Tokens of an answer.
        requests: How many requests to play through.
        seed: Of the times that are drawn.
    """

    pictures: tuple[int, ...]
    rate: float
    burstiness_cv: float = 1.0
    text_tokens: int = 100
    output_tokens: int = 64
    requests: int = 500
    seed: int = 0
    images: int | None = None

    def check(self) -> None:
        """Checks the parameters.

        Raises:
            WorkloadInvalid: one is out of range; the text says which.
        """
        wrong = {
            f"--rate: at least {LEAST_RATE:g}, at most a million requests a second": not is_rate(self.rate),
            f"--burstiness-cv: {CV_RANGE}": not is_cv(self.burstiness_cv),
            "--prompt-tokens: at least 1": self.text_tokens < 1,
            "--output-tokens: at least 1": self.output_tokens < 1,
            "--requests: at least 2": self.requests < 2,
            "--seed: at least 0": self.seed < 0,
            "--images: a picture has at least one visual token": any(tokens < 1 for tokens in self.pictures),
            f"--requests times --output-tokens: at most {MOST_STEPS:,}; fewer requests say the same": (
                self.requests * self.output_tokens > MOST_STEPS
            ),
            f"--requests times --images: at most {MOST_PICTURES:,}; fewer requests say the same": (
                self.requests * max(1, self.images or len(self.pictures)) > MOST_PICTURES
            ),
        }
        for rule, broken in wrong.items():
            if broken:
                raise WorkloadInvalid(rule)

    def asked(self) -> list[Asked]:
        """Returns the requests in the order of their times.

        Raises:
            WorkloadInvalid: a parameter is out of range.
        """
        self.check()
        plan = Plan(requests=self.requests, rate=self.rate, burstiness_cv=self.burstiness_cv, seed=self.seed)
        times = arrivals(plan, np.random.default_rng(self.seed).spawn(4)[0])  # the same draw as in the benchmark
        images = len(self.pictures) if self.images is None else self.images
        turn = itertools.cycle(self.pictures)
        return [Asked(at, tuple(itertools.islice(turn, images)), self.text_tokens, self.output_tokens) for at in times]
