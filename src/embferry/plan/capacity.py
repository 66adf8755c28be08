"""Requests a second that a deployment carries at most, by the demand laws of operational analysis.

A stage that works ``D`` seconds for each request ends at most ``1 / D`` requests a second; the slowest stage limits all
(Denning and Buzen, 1978). Instances of one kind share their stage's work evenly. Cores that all instances share are a
stage of their own, and so is the link of each language instance.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from .curve import Curve
from .deployment import Deployment
from .speeds import Speeds
from .workload import Asked

FRONT, ENCODER, LANGUAGE = "the front end", "the vision encoder", "the language model"
LINK, CORES = "the link of each language instance", "the cores"


class Demands(msgspec.Struct, frozen=True):
    """Seconds that each stage works for a request, on average. They are the same however many instances there are."""

    speeds: Speeds
    is_split: bool
    prepare: float
    encode: float
    handover: float
    link: float
    language: float

    @classmethod
    def of(cls, asked: Sequence[Asked], speeds: Speeds, token_bytes: int = 0, *, is_split: bool) -> Demands:
        """Returns the demands of the requests.

        Args:
            asked: The requests.
            speeds: How long each stage takes.
            token_bytes: Bytes of a visual token of an embedding.
            is_split: Whether encoders are instances of their own.
        """
        own = speeds.when_split if is_split else speeds
        pictures = Counter[int]()
        for one in asked:
            pictures.update(one.pictures)
        # Many requests are of few kinds, so each kind is computed once.
        kinds = Counter((one.prompt_tokens, one.output_tokens) for one in asked)

        def mean(curve: Curve) -> float:
            return math.fsum(curve.at(tokens) * count for tokens, count in pictures.items()) / len(asked)

        tokens = sum(tokens * count for tokens, count in pictures.items()) / len(asked)
        language = math.fsum(_language(*kind, own) * count for kind, count in kinds.items()) / len(asked)
        return cls(
            own,
            is_split,
            prepare=mean(own.prepare),
            encode=mean(own.encode),
            handover=mean(own.handover),
            link=tokens * token_bytes / own.bandwidth if own.bandwidth else 0.0,
            language=language,
        )

    @classmethod
    def both(cls, asked: Sequence[Asked], speeds: Speeds, token_bytes: int = 0) -> dict[bool, Demands]:
        """Returns the demands by whether encoders are instances of their own."""
        return {kind: cls.of(asked, speeds, token_bytes, is_split=kind) for kind in (False, True)}

    def stages(self, deployment: Deployment) -> dict[str, float]:
        """Returns the seconds a request of each stage of a deployment, which is split if these demands are."""
        speeds, request, languages = self.speeds, self.speeds.request, deployment.languages
        if not self.is_split:
            found = {FRONT: (request + self.prepare) / languages, LANGUAGE: (self.encode + self.language) / languages}
            work = request + self.prepare + self.encode + self.language
        else:
            found = {
                ENCODER: max(self.prepare, self.encode) / deployment.encoders,
                FRONT: request / languages,
                LANGUAGE: self.language / languages,
                LINK: self.link / languages,
            }
            work = request + speeds.split_request + self.prepare + self.encode + self.handover + self.language
        if speeds.cores is not None:
            found[CORES] = work * speeds.load / speeds.cores
        return found

    def capacity(self, deployment: Deployment) -> float:
        """Returns the most requests a second of a deployment."""
        return 1 / max(self.stages(deployment).values())

    def fewest(self, rate: float) -> Deployment:
        """Returns the smallest deployment whose instances carry a rate; shared cores may still be too few."""
        each = self.stages(Deployment(int(self.is_split), 1))
        encoders, cores = each.pop(ENCODER, 0.0), each.pop(CORES, 0.0)
        del cores
        return Deployment(_instances(rate * encoders) if self.is_split else 0, _instances(rate * max(each.values())))


def capacity(asked: Sequence[Asked], deployment: Deployment, speeds: Speeds, token_bytes: int = 0) -> float:
    """Returns the most requests a second, of the mix that is asked."""
    return Demands.of(asked, speeds, token_bytes, is_split=deployment.is_split).capacity(deployment)


def _instances(busy: float) -> int:
    """Returns how many instances are busy at most all of the time, if one would be busy this many times that."""
    return max(1, math.ceil(busy - 1e-9))


def _language(prompt_tokens: int, output_tokens: int, speeds: Speeds) -> float:
    """Returns the seconds of a language model for one of many requests that it runs at once.

    It shares each step with as many as the model runs at once. Its prefill is part of steps that others have anyway.
    """
    together = speeds.batch_requests
    return speeds.prefill.at(prompt_tokens) + max(0, output_tokens - 1) * speeds.step.at(together) / together
