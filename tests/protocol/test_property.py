"""A random search over both ends, several rooms, one pool and all faults between them.

``EMBFERRY_HYPOTHESIS_PROFILE=thorough`` searches for minutes instead of seconds. The search is bounded by its number of
examples, never by time: on a busy machine it only takes longer.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .model import TransferStories

PROFILES: dict[str, dict[str, Any]] = {
    "default": {"max_examples": 600, "stateful_step_count": 50, "derandomize": True},
    "thorough": {"max_examples": 5000, "stateful_step_count": 80, "print_blob": True},
}


def search(**options: Any) -> None:
    """Plays examples until an invariant breaks or all of them have been played."""
    run_state_machine_as_test(
        TransferStories,
        settings=settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options),
    )


@pytest.mark.timeout(0)
def test_no_sequence_of_events_breaks_an_invariant() -> None:
    search(**PROFILES[os.environ.get("EMBFERRY_HYPOTHESIS_PROFILE", "default")])
