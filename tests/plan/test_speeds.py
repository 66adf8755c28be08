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
    "data",
    [
        b"",
        b"[]",
        b'{"encode": 1}',
        b'{"encode": {"each": 1}, "prefill": {}, "step": {}, "speed": 1}',
        b"\xff",
        b'{"encode": ["' + b"[" * 10**5,
    ],
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
        ({"slack": 10**400}, r"slack is 1e\+300"),
        ({"batch_requests": 10**400}, r"batch_requests is 1e\+300"),
        ({"encode": Curve(each=1e308)}, r"encode.each is 1e\+308"),
        ({"encode": Curve(each=1e-308)}, "have to take some time"),
        ({"bandwidth": 1e-300}, "bandwidth is 1e-300"),
        ({"cores": 1e-300}, "cores is 1e-300"),
        ({"split_load": 1e300}, r"split_load is 1e\+300"),
        ({"encode": Curve()}, "have to take some time"),
        ({"prefill": Curve(), "step": Curve()}, "have to take some time"),
    ],
)
def test_impossible_values_are_named(change: dict[str, object], words: str) -> None:
    speeds: Speeds = msgspec.structs.replace(SPEEDS, **change)
    with pytest.raises(SpeedsInvalid, match=words):
        speeds.check()
