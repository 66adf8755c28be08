"""Both ends, several rooms, one pool, and everything that can go wrong between them.

``EMBFERRY_HYPOTHESIS_PROFILE=thorough`` looks for minutes instead of seconds.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .model import Ferry

PROFILES: dict[str, dict[str, Any]] = {
    "default": {"max_examples": 600, "stateful_step_count": 50, "derandomize": True},
    "thorough": {"max_examples": 5000, "stateful_step_count": 80, "print_blob": True},
}


def search(**options: Any) -> None:
    """Plays stories until an invariant breaks or the examples are used up."""
    run_state_machine_as_test(
        Ferry, settings=settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    )


def test_every_story_ends_well() -> None:
    search(**PROFILES[os.environ.get("EMBFERRY_HYPOTHESIS_PROFILE", "default")])
