"""Stories with fixed seeds. ``make simulate SEEDS=N`` tells more of them."""

from __future__ import annotations

import pytest

from embferry.testing.virtual import VirtualWorld

from .found import FOUND, told_again
from .simulation import play
from .story import Story, draw, shrink

STORIES = 300
EACH = 25


@pytest.mark.parametrize("first", range(0, STORIES, EACH))
def test_no_story_breaks_an_invariant(first: int) -> None:
    for seed in range(first, first + EACH):
        try:
            play(draw(seed))
        except Exception as error:  # noqa: BLE001  (any exception is a finding; the story tells why)
            pytest.fail(f"seed {seed}: {error!r}\nmake simulate FIRST={seed} SEEDS=1 shrinks this story")


@pytest.mark.parametrize("name", FOUND)
def test_a_story_that_showed_a_fault_ends_as_it_must(name: str) -> None:
    for story in told_again(FOUND[name]):
        play(story)


@pytest.mark.parametrize("seed", range(8))
def test_a_story_is_told_the_same_way_again(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    later = VirtualWorld.later

    def note(self: VirtualWorld, delay: float, call: object) -> None:
        times.append(self.now + delay)
        later(self, delay, call)  # type: ignore[arg-type]

    monkeypatch.setattr(VirtualWorld, "later", note)
    play(draw(seed))
    first = times.copy()
    times.clear()
    play(Story.parse(str(draw(seed))))
    assert times == first


def test_a_failing_story_is_shrunk_to_the_moves_that_matter() -> None:
    story = draw(3)
    kinds = [move[1] for move in story.moves]
    needed = {kinds[2], kinds[-1]}
    small = shrink(story, lambda candidate: needed <= {move[1] for move in candidate.moves})
    assert {move[1] for move in small.moves} == needed
    assert len(small.moves) == len(needed)
