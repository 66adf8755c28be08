"""The file of speeds: written, read again, refused."""

from __future__ import annotations

import math

import msgspec
import pytest

from embferry.plan.curve import Curve
from embferry.plan.errors import SpeedsInvalid
from embferry.plan.speeds import Speeds, decoded, encoded

from .examples import SPEEDS


def test_what_is_written_is_read_again() -> None:
    speeds = msgspec.structs.replace(SPEEDS, cores=2.0, bandwidth=1e9, source="a test")
    assert decoded(encoded(speeds), "x") == speeds


@pytest.mark.parametrize(
    "data", [b"", b"[]", b'{"encode": 1}', b'{"encode": {"each": 1}, "prefill": {}, "step": {}, "speed": 1}', b"\xff"]
)
def test_something_else_is_refused(data: bytes) -> None:
    with pytest.raises(SpeedsInvalid, match=r"speeds\.json has no speeds.*--measure"):
        decoded(data, "speeds.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encode": Curve(base=-1.0)}, "encode.base is -1"),
        ({"step": Curve(each=math.nan)}, "step.each is nan"),
        ({"handover": Curve(square=math.inf)}, "handover.square is inf"),
        ({"split_step": Curve(base=-1.0)}, "split_step.base is -1"),
        ({"request": -0.1}, "request is -0.1"),
        ({"resume": -1.0}, "resume is -1"),
        ({"bandwidth": 0.0}, "bandwidth is 0"),
        ({"cores": -2.0}, "cores is -2"),
        ({"load": 0.0}, "load is 0"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"slack": -1}, "slack is -1"),
        ({"encode": Curve()}, "have to take some time"),
        ({"prefill": Curve(), "step": Curve()}, "have to take some time"),
    ],
)
def test_impossible_values_are_named(change: dict[str, object], words: str) -> None:
    speeds: Speeds = msgspec.structs.replace(SPEEDS, **change)
    with pytest.raises(SpeedsInvalid, match=words):
        speeds.check()
