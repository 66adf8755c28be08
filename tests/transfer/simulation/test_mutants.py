"""Every guard of the driver is needed: without it, one of the fixed stories breaks an invariant."""

from __future__ import annotations

from itertools import chain

import pytest

from .found import FOUND, told_again
from .mutants import MUTANTS
from .simulation import failure
from .story import draw
from .test_simulation import STORIES


@pytest.mark.parametrize("name", MUTANTS)
def test_a_story_breaks_without_the_guard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    found = chain.from_iterable(map(told_again, FOUND.values()))
    stories = chain(found, map(draw, range(STORIES)))
    assert any(failure(story) is not None for story in stories)
