"""How much to play: a plan is to take seconds, however many pictures the requests have."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from .deployment import Deployment
from .errors import WorkloadInvalid
from .simulation import DRAWS
from .speeds import Speeds
from .workload import Asked

MOST_WORK = 3_000_000
"""Tokens of the answers in all plays together: about seven seconds of one core."""
PART = 6
"""Tokens of answers that take as long to play as a request, a picture, or a step's part of a prompt."""


class Effort(NamedTuple):
    """How many of the requests to play, and with how many draws of the pictures' homes."""

    requests: int
    draws: int

    def told(self, requests: int) -> str:
        """Returns what was left out, in words; empty if nothing was."""
        found = [] if self.requests >= requests else [f"the first {self.requests:,} of {requests:,} requests"]
        found += [] if self.draws >= DRAWS else [f"{self.draws} of {DRAWS} draws of the encoders of the pictures"]
        return f"played, to end within seconds: {', '.join(found)}" if found else ""


def effort(asked: Sequence[Asked], deployments: Sequence[Deployment], speeds: Speeds, most: int = MOST_WORK) -> Effort:
    """Returns how much to play so that all plays together have at most so much work.

    First there are fewer draws, as the encoders of many pictures are drawn many times in one play. Then there are fewer
    requests, but two at least.

    Args:
        asked: The requests.
        deployments: Each is played.
        speeds: Of their stages.
        most: Tokens of answers, or as much other work.

    Raises:
        WorkloadInvalid: one request alone has more work than a plan.
    """
    works = [work(one, speeds) for one in asked]
    if max(works[:2]) > MOST_WORK:
        raise WorkloadInvalid(
            f"a prompt of {asked[0].prompt_tokens:,} tokens and an answer of {asked[0].output_tokens:,} take too many "
            f"steps of batch_tokens ({speeds.batch_tokens})"
        )
    drawn = sum(one.encoders > 1 for one in deployments)
    once, whole = len(deployments) - drawn, sum(works)
    draws = min(DRAWS, max(1, (most // whole - once) // drawn)) if drawn else DRAWS
    limit = most // max(1, once + drawn * (draws if drawn else 0))
    fitting = sum(total <= limit for total in accumulate(works))
    return Effort(min(len(asked), max(2, fitting)), draws)


def work(one: Asked, speeds: Speeds) -> int:
    """Returns how much work it is to play a request, in tokens of answers."""
    return one.output_tokens + PART * (1 + len(one.pictures) + one.prompt_tokens // speeds.batch_tokens)
