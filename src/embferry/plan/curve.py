"""Seconds as a function of a number, and its fit to measured points."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import msgspec
import numpy as np


class Curve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``base + each · n + square · n²`` seconds.

    Attention within a picture or a prompt makes the square; a model on a large device hardly shows it.
    """

    base: float = 0.0
    each: float = 0.0
    square: float = 0.0

    def at(self, n: float) -> float:
        return self.base + self.each * n + self.square * n * n

    def scaled(self, factor: float) -> Curve:
        return Curve(self.base * factor, self.each * factor, self.square * factor)


def fitted(points: Sequence[tuple[float, float]], wholes: Sequence[float] | None = None) -> Curve:
    """Returns the curve with the least squared errors, relative to what was measured, with no negative parameter.

    Args:
        points: Numbers with their seconds. These may be negative where they are a difference of two measured times.
        wholes: For seconds that are a part of a measured time, each of those times: what disturbs the whole disturbs a
            part of it as much. None if the seconds themselves were measured.

    Returns:
        All zero without points.

    The parameters that the points do not need, or too few points determine, are zero. All subsets of the three are
    tried, which is exact for non-negative least squares (Lawson and Hanson, 1974) and short for three.
    """
    if not points:
        return Curve()
    n, seconds = np.array(points, dtype=float).T
    columns = np.stack([np.ones_like(n), n, n * n], axis=1)
    scale = np.abs(columns).max(axis=0)
    scale[scale == 0] = 1.0
    measured = np.abs(seconds if wholes is None else np.array(wholes, dtype=float))
    # A small time matters as much as a large one, but not below a tenth of the median: that would be noise.
    weight = 1 / np.maximum(measured, 0.1 * max(float(np.median(measured)), 1e-9))
    most = len({*n.tolist()})
    best, least = (0.0, 0.0, 0.0), float((weight * seconds) @ (weight * seconds))
    for count in range(1, min(3, most) + 1):
        for chosen in combinations(range(3), count):
            matrix = (columns / scale)[:, chosen] * weight[:, None]
            found = np.linalg.lstsq(matrix, seconds * weight, rcond=None)[0]
            error = float(((matrix @ found - seconds * weight) ** 2).sum())
            if (found >= 0).all() and error < least * (1 - 1e-9):
                values = [0.0, 0.0, 0.0]
                for index, value in zip(chosen, (found / scale[list(chosen)]).tolist(), strict=True):
                    values[index] = value
                best, least = (values[0], values[1], values[2]), error
    return Curve(*best)
