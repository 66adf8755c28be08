"""Requests a second that a deployment carries at most, by the demand laws of operational analysis.

A stage that works ``D`` seconds for each request ends at most ``1 / D`` requests a second; the slowest stage limits all
(Denning and Buzen, 1978). Instances of one kind share their stage's work evenly. Cores that all instances share are a
stage of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import msgspec

from .deployment import Deployment
from .speeds import Speeds
from .workload import Asked


class Demands(msgspec.Struct, frozen=True):
    """Seconds that each stage works for a request, on average. They are the same however many instances there are."""

    speeds: Speeds
    prepare: float
    encode: float
    handover: float
    language: float

    @classmethod
    def of(cls, asked: Sequence[Asked], speeds: Speeds, *, is_split: bool) -> Demands:
        """Returns the demands of the requests."""
        own = speeds.when_split if is_split else speeds
        prepare, encode, handover = (
            fmean(sum(curve.at(tokens) for tokens in one.pictures) for one in asked)
            for curve in (own.prepare, own.encode, own.handover)
        )
        return cls(own, prepare, encode, handover, fmean(_language(one, own) for one in asked))

    def capacity(self, deployment: Deployment) -> float:
        """Returns the most requests a second of a deployment, which is split if these demands are."""
        speeds, request = self.speeds, self.speeds.request
        if not deployment.is_split:
            demands = [(request + self.prepare) / deployment.languages]
            demands.append((self.encode + self.language) / deployment.languages)
            work = request + self.prepare + self.encode + self.language
        else:
            demands = [self.prepare / deployment.encoders, self.encode / deployment.encoders]
            demands += [request / deployment.languages, self.language / deployment.languages]
            work = request + speeds.split_request + self.prepare + self.encode + self.handover + self.language
        if speeds.cores is not None:
            demands.append(work * speeds.load / speeds.cores)
        return 1 / max(demands)


def capacity(asked: Sequence[Asked], deployment: Deployment, speeds: Speeds) -> float:
    """Returns the most requests a second, of the mix that is asked."""
    return Demands.of(asked, speeds, is_split=deployment.is_split).capacity(deployment)


def _language(one: Asked, speeds: Speeds) -> float:
    """Returns the seconds of a language model for one of many requests that it runs at once.

    It shares each step with as many as the model runs at once. Its prefill is part of steps that others have anyway.
    """
    together = speeds.batch_requests
    return speeds.prefill.at(one.prompt_tokens) + max(0, one.output_tokens - 1) * speeds.step.at(together) / together
