"""Plays requests through a deployment, and says when each had its first token and its last.

A discrete-event simulation with the stages of one request: the front end, the encoder, the transfer, and a language
model that batches. Nothing is drawn but the encoder at which a picture is at home, from fixed seeds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from .clock import Clock, Then
from .deployment import Deployment
from .engine import Engine, Prompt
from .link import Link
from .outcome import Ended, Outcome, pooled
from .pool import Pool
from .speeds import Speeds
from .station import Station
from .workload import Asked

DRAWS = 15
"""Plays of the same requests, each with other homes of the pictures."""


class Encoder:
    """An instance that encodes."""

    def __init__(self, clock: Clock) -> None:
        self.front, self.encoder = Station(clock), Station(clock)
        self.pictures = 0


class Language:
    """An instance that answers; without encoders it encodes too."""

    def __init__(self, clock: Clock, speeds: Speeds) -> None:
        self.front, self.engine, self.link = Station(clock), Engine(clock, speeds), Link(clock)
        self.requests = 0
        self.arriving = 0
        """Visual tokens between encoder and language instance."""


class Simulation:
    """One play.

    Args:
        deployment: The instances.
        speeds: How long each stage takes.
        token_bytes: Bytes of a visual token of an embedding.
        pool: The receive pool of each language instance; None for one that everything fits into.
        draw: Which of many draws of the pictures' homes to play.
    """

    def __init__(
        self, deployment: Deployment, speeds: Speeds, token_bytes: int = 0, pool: Pool | None = None, draw: int = 0
    ) -> None:
        self._deployment, self._speeds = deployment, speeds.when_split if deployment.is_split else speeds
        self._token_bytes, self._pool = token_bytes, pool
        self._clock = Clock(speeds.cores, self._speeds.load)
        self._encoders = [Encoder(self._clock) for _ in range(deployment.encoders)]
        self._languages = [Language(self._clock, self._speeds) for _ in range(deployment.languages)]
        self._chance = random.Random(draw)
        self._ended: list[Ended] = []
        self._resumes, self._peak, self._turn = 0, 0, 0

    def play(self, asked: Sequence[Asked], concurrency: int = 0) -> Outcome:
        """Returns what comes of the requests.

        Args:
            asked: In the order of their times.
            concurrency: Requests under way at once; 0 for any number. The clock of one that waits has not started.
        """
        late = list(reversed(asked[concurrency:])) if concurrency else []

        def next_one() -> None:
            if late:
                self._begin_at(late.pop(), next_one)

        for one in asked[: concurrency or None]:
            self._begin_at(one, next_one)
        self._clock.run()
        span = max((one.ended for one in self._ended), default=0.0)
        fronts = [language.front.busy for language in self._languages]
        engines = [language.engine.busy for language in self._languages]
        return Outcome(
            requests=sorted(self._ended, key=lambda one: one.began),
            duration=span,
            encoder_busy=_share([max(one.front.busy, one.encoder.busy) for one in self._encoders], span),
            language_busy=_share([max(pair) for pair in zip(fronts, engines, strict=True)], span),
            resumes=self._resumes,
            peak_arriving=self._peak,
        )

    def _begin_at(self, one: Asked, ended: Then) -> None:
        self._clock.at(one.at, lambda: self._begin(one, ended))

    def _begin(self, one: Asked, then: Then) -> None:
        language, began = self._language(), self._clock.now
        language.requests += 1
        first = [began]

        def is_first() -> None:
            first[0] = self._clock.now

        def ended() -> None:
            language.requests -= 1
            self._ended.append(Ended(began, first[0], self._clock.now))
            then()

        speeds = self._speeds
        encode = 0.0 if self._deployment.is_split else sum(speeds.encode.at(tokens) for tokens in one.pictures)
        prompt = Prompt(one.prompt_tokens, one.output_tokens, encode, is_first, ended)
        if not self._deployment.is_split:
            prepare = sum(speeds.prepare.at(tokens) for tokens in one.pictures)
            language.front.add(speeds.request + prepare, lambda: language.engine.add(prompt))
            return
        missing = [1 + len(one.pictures)]

        def has_part() -> None:
            missing[0] -= 1
            if not missing[0]:
                language.engine.add(prompt)

        def routed() -> None:
            language.front.add(speeds.request, has_part)
            for tokens in one.pictures:
                self._encode(tokens, language, has_part)

        self._clock.work(speeds.split_request, routed)

    def _encode(self, tokens: int, language: Language, then: Then) -> None:
        """Has a picture prepared, encoded and handed over."""
        encoder, speeds = self._encoder(), self._speeds
        encoder.pictures += 1

        def prepared() -> None:
            encoder.encoder.add(speeds.encode.at(tokens), encoded)

        def encoded() -> None:
            encoder.pictures -= 1
            self._transfer(tokens, language, moved)

        def moved() -> None:
            self._clock.work(speeds.handover.at(tokens), arrived)

        def arrived() -> None:
            language.arriving -= tokens
            then()

        encoder.front.add(speeds.prepare.at(tokens), prepared)

    def _transfer(self, tokens: int, language: Language, then: Then) -> None:
        """Moves an embedding over the link of its language instance; resumed transfers take time before that."""
        resumes = self._pool.resumes(tokens, language.arriving) if self._pool is not None else 0
        self._resumes += resumes
        language.arriving += tokens
        self._peak = max(self._peak, language.arriving)
        bandwidth = self._speeds.bandwidth
        seconds = tokens * self._token_bytes / bandwidth if bandwidth else 0.0
        self._clock.after(
            resumes * self._speeds.resume, lambda: language.link.add(seconds, then) if seconds else then()
        )

    def _encoder(self) -> Encoder:
        """Returns the encoder for a picture: its home, unless that has much more to do than another."""
        home = self._chance.choice(self._encoders)
        idlest = min(self._encoders, key=lambda one: one.pictures)
        return idlest if home.pictures - idlest.pictures > self._speeds.slack else home

    def _language(self) -> Language:
        """Returns the instance with the fewest requests, of several the one whose turn it is."""
        self._turn += 1
        turned = self._languages[self._turn % len(self._languages) :] + self._languages
        return min(turned[: len(self._languages)], key=lambda one: one.requests)


def _share(busy: list[float], span: float) -> float:
    """Returns the mean share of the time in which instances were busy."""
    return min(1.0, sum(busy) / len(busy) / span) if busy and span > 0 else 0.0


def plays(
    asked: Sequence[Asked],
    deployment: Deployment,
    speeds: Speeds,
    token_bytes: int = 0,
    pool: Pool | None = None,
    concurrency: int = 0,
    draws: int = DRAWS,
) -> list[Outcome]:
    """Returns what may come of requests in a deployment; the arguments are those of :class:`Simulation`.

    A picture has its home by its content, which a plan does not know. Where there are several encoders, the requests
    are played ``draws`` times: one play alone says as much about its draw as about the deployment.
    """
    drawn = range(draws if deployment.encoders > 1 else 1)
    return [Simulation(deployment, speeds, token_bytes, pool, draw).play(asked, concurrency) for draw in drawn]


def play(
    asked: Sequence[Asked],
    deployment: Deployment,
    speeds: Speeds,
    token_bytes: int = 0,
    pool: Pool | None = None,
    concurrency: int = 0,
    draws: int = DRAWS,
) -> Outcome:
    """Returns all :func:`plays` as one outcome."""
    return pooled(plays(asked, deployment, speeds, token_bytes, pool, concurrency, draws))
