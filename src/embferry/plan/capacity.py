"""Requests a second that a deployment carries at most, by the demand laws of operational analysis.

A stage that works ``D`` seconds for each request ends at most ``1 / D`` requests a second; the slowest stage limits all
(Denning and Buzen, 1978). Instances of one kind share their stage's work evenly. Cores that all instances share are a
stage of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from .deployment import Deployment
from .speeds import Speeds
from .workload import Asked


def capacity(asked: Sequence[Asked], deployment: Deployment, speeds: Speeds) -> float:
    """Returns the most requests a second, of the mix that is asked."""
    speeds = speeds.when_split if deployment.is_split else speeds
    prepare = mean(sum(speeds.prepare.at(tokens) for tokens in one.pictures) for one in asked)
    encode = mean(sum(speeds.encode.at(tokens) for tokens in one.pictures) for one in asked)
    language = mean(_language(one, speeds) for one in asked)
    if not deployment.is_split:
        demands = [(speeds.request + prepare) / deployment.languages, (encode + language) / deployment.languages]
        work = speeds.request + prepare + encode + language
    else:
        handover = mean(sum(speeds.handover.at(tokens) for tokens in one.pictures) for one in asked)
        demands = [prepare / deployment.encoders, encode / deployment.encoders]
        demands += [speeds.request / deployment.languages, language / deployment.languages]
        work = speeds.request + speeds.split_request + prepare + encode + handover + language
    if speeds.cores is not None:
        demands.append(work * speeds.load / speeds.cores)
    return 1 / max(demands)


def _language(one: Asked, speeds: Speeds) -> float:
    """Returns the seconds of a language model for one of many requests that it runs at once.

    It shares each step with as many as the model runs at once. Its prefill is part of steps that others have anyway.
    """
    together = speeds.batch_requests
    return speeds.prefill.at(one.prompt_tokens) + max(0, one.output_tokens - 1) * speeds.step.at(together) / together
