"""Stories: what happens in a simulation, as data that can be drawn from a seed, shrunk, printed and told again."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

Move = tuple[float, str, int, int, int]
"""Seconds before it, its name, and three small numbers that mean something modulo what exists."""

WEIGHTS: dict[str, int] = {
    # what users do
    "begin": 14,
    "other_end": 8,
    "produce": 9,
    "consume": 7,
    "read": 6,
    "clear": 3,
    "abort": 2,
    "redirect": 5,
    "reopen": 3,
    "wait": 3,
    # what happens to processes and wires
    "weather": 6,
    "cut": 3,
    "reset": 3,
    "pause": 3,
    "resume": 4,
    "kill_encode": 2,
    "kill_language": 1,
    "replace": 1,
    # foreign code that raises or is slow
    "break_sink": 8,
    "break_make": 3,
    "break_callback": 4,
    "break_source": 4,
    "break_transport": 7,
    "break_control": 3,
    "break_threads": 3,
    "break_machine": 4,
    # peers
    "lie": 6,
    "noise": 2,
    "flood": 2,
}
BEGINNING = ("begin", "begin", "begin", "other_end", "produce")
THEMES: tuple[tuple[str, ...], ...] = (
    ("redirect", "read", "consume", "produce", "break_sink", "weather"),
    ("break_transport", "break_transport", "begin", "produce", "weather"),
    ("break_machine", "break_machine", "reopen", "reopen", "consume", "consume", "produce"),
    ("lie", "noise", "flood", "reset"),
    ("break_sink", "break_make", "break_callback", "break_threads"),
    ("pause", "resume", "kill_encode", "redirect", "replace", "produce"),
)
"""Moves that belong together. Half of the stories have one theme."""
MOST_SECONDS = 12.0
"""Most time that the moves of a story take: shorter than every time-out of a patient worker."""


@dataclass(frozen=True)
class Story:
    """A simulation that can be told again.

    Attributes:
        seed: Of delays and losses.
        setup: Small numbers that choose the sizes and time-outs.
        moves: What happens.
    """

    seed: int
    setup: int
    moves: tuple[Move, ...]

    def __str__(self) -> str:
        lines = "".join(f"    {move},\n" for move in self.moves)
        return f"({self.seed}, {self.setup}, [\n{lines}])"

    @classmethod
    def parse(cls, text: str) -> Story:
        """Returns the story that ``text`` is the printed form of."""
        seed, setup, moves = ast.literal_eval(text)
        return cls(seed, setup, tuple(tuple(move) for move in moves))


def draw(seed: int) -> Story:
    """Returns the story of a seed."""
    rng = random.Random(seed)
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    count = rng.choice((12, 25, 40))
    kinds = [*rng.choices(BEGINNING, k=4), *rng.choices(names, weights, k=count)]
    if rng.random() < 0.5:
        theme = rng.choice(THEMES)
        kinds = [kind for kind in kinds if kind in (*theme, *BEGINNING)] + rng.choices((*theme, *theme, "begin"), k=14)
    moves: list[Move] = []
    left = MOST_SECONDS
    for kind in kinds:
        delay = round(rng.choice((0.0, rng.uniform(0, 0.02), rng.uniform(0, 0.02), rng.uniform(0, 0.5))), 4)
        if rng.random() < 0.06:
            delay = round(rng.uniform(0, 3), 3)
        delay = delay if delay <= left else 0.0
        left -= delay
        moves.append((delay, kind, rng.randrange(64), rng.randrange(64), rng.randrange(64)))
    return Story(seed, rng.randrange(64), tuple(moves))


def shrink(story: Story, fails: Callable[[Story], bool], most_tries: int = 2000) -> Story:
    """Returns the smallest story that can be found by removing moves of one that fails (ddmin, Zeller 2002)."""
    tries = 0

    def test(candidate: Story) -> bool:
        nonlocal tries
        tries += 1
        return tries <= most_tries and fails(candidate)

    size = max(1, len(story.moves) // 2)
    while True:
        at, removed = 0, False
        while at < len(story.moves):
            candidate = replace(story, moves=story.moves[:at] + story.moves[at + size :])
            if test(candidate):
                story, removed = candidate, True
            else:
                at += size
        if size == 1 and not removed:
            return story
        size = max(1, size // 2) if not removed or size > 1 else 1
