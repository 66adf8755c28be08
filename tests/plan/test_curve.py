"""Curves, and their fit to measured points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.curve import Curve, fitted

PARAMETER = st.floats(0.0, 1.0).map(lambda value: 0.0 if value < 1e-3 else value)


def test_a_curve_adds_its_parts() -> None:
    assert Curve(1.0, 2.0, 3.0).at(10) == 321.0
    assert Curve(1.0, 2.0, 3.0).scaled(0.5) == Curve(0.5, 1.0, 1.5)


@given(PARAMETER, PARAMETER, PARAMETER)
def test_points_of_a_curve_give_the_curve(base: float, each: float, square: float) -> None:
    curve = Curve(base, each * 1e-2, square * 1e-4)
    found = fitted([(n, curve.at(n)) for n in (10, 100, 500, 1000)])
    for n in (10, 50, 300, 1000):
        assert found.at(n) == pytest.approx(curve.at(n), rel=1e-3, abs=1e-9)


def test_no_part_is_negative() -> None:
    found = fitted([(100, 0.5), (200, 0.3), (300, 0.1)])
    assert min(found.base, found.each, found.square) >= 0


def test_few_points_determine_few_parts() -> None:
    assert fitted([]) == Curve()
    assert fitted([(8, 0.25)]).at(8) == pytest.approx(0.25)
    line = fitted([(1, 0.5), (8, 1.2)])
    assert (line.at(1), line.at(8)) == (pytest.approx(0.5), pytest.approx(1.2))


def test_a_point_without_time_is_no_obstacle() -> None:
    assert fitted([(64, 0.0), (256, 0.0)]) == Curve()


def test_a_difference_counts_as_much_as_what_it_is_a_part_of() -> None:
    """A time of nothing would weigh a hundred times as much as the others, and hide what they say."""
    points, wholes = [(64, 0.014), (256, 0.012), (576, 0.010), (1024, -0.002)], [0.055, 0.085, 0.155, 0.305]
    assert fitted(points, wholes).at(64) == pytest.approx(0.013, abs=0.001)
    assert fitted([(n, max(0.0, seconds)) for n, seconds in points]).at(64) < 0.002
