"""Inputs, as small as they were found, that showed a fault. Each is run by the tests, with every check."""

from __future__ import annotations

from .raw import Pieces

FOUND: dict[str, tuple[str, Pieces]] = {}
"""By what was wrong: the target and the input."""
