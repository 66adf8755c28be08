"""A place where a fault can strike, and the end of the transfer that it hits."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from .fault import Trip
from .scene import Scene, Transfer


class End(enum.Enum):
    """The end of the transfer that is hit. One that is only slow always arrives."""

    FAILS = enum.auto()
    ARRIVES = enum.auto()
    CLEAR_RAISES = enum.auto()
    """It arrives; the caller's ``clear()`` raises."""
    CLOSE_RAISES = enum.auto()
    """It arrives; the manager's ``close()`` raises."""


class Strikes(enum.Enum):
    """When the fault strikes. The test waits for it there."""

    BEFORE_THE_END = enum.auto()
    AFTER_THE_END = enum.auto()
    """After the transfer has arrived, before ``close()``."""
    AT_CLOSE = enum.auto()


Plant = Callable[[Scene, Trip, pytest.MonkeyPatch], Transfer]


@dataclass(frozen=True)
class Place:
    """A place.

    Attributes:
        plant: Puts the fault there and begins the transfer that is hit.
        end: What becomes of that.
        strikes: When the fault strikes.
        is_machine: Whether it is a state machine, which calls no foreign code.
    """

    name: str
    plant: Plant
    end: End = End.FAILS
    strikes: Strikes = Strikes.BEFORE_THE_END
    is_machine: bool = False
