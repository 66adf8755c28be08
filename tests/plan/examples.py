"""Speeds and requests whose outcome can be computed by hand."""

from __future__ import annotations

from embferry.plan.curve import Curve
from embferry.plan.speeds import Speeds
from embferry.plan.workload import Asked

SPEEDS = Speeds(encode=Curve(each=0.001), prefill=Curve(each=0.0001), step=Curve(base=0.01))
"""A picture of 100 tokens takes 0.1 s to encode, its prompt 0.02 s with 100 tokens of text, a step 0.01 s."""


def asked(*times: float, pictures: tuple[int, ...] = (100,), output_tokens: int = 1) -> list[Asked]:
    """Returns requests at these times, with 100 tokens of text."""
    return [Asked(at, pictures, 100, output_tokens) for at in times]
