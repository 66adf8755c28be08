"""The recipe: what is trained on, for how long, how fast. Only data.

Editing a stage that has not begun and resuming is how a recipe is mended while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from training.shapes.batches import Layout

SEED = 2026
QUESTIONS = 8
"""Questions about one picture, several or a clip."""
OBJECT_WEIGHT, NUMBER_WEIGHT = 0.4, 0.3
"""Weights of the auxiliary losses beside that of the answers."""
WARMUP = 150
AVERAGE = 0.998
"""Decay of the running average of the weights, which is what is exported."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """`steps` batches. `rates`: learning rate at the start and the end, linear between.

    `shares`: of pictures, several pictures and clips. `budget`: visual tokens a batch, at most.
    `text`: whether questions are asked, or only the auxiliary losses are learned. `frozen`: the vision
    encoder stays as it is, but for its mergers, which saves a third of a step.
    """

    name: str
    steps: int
    rates: tuple[float, float]
    sizes: tuple[Size, ...]
    shares: tuple[float, float, float] = (0.5, 0.25, 0.25)
    pictures: tuple[int, ...] = (2, 3)
    patches: tuple[int, ...] = (2, 3, 4)
    budget: int = 1280
    most: int = 64
    text: bool = True
    frozen: bool = False

    def layout(self, rng: Random) -> Layout:
        form = rng.choices(("picture", "pictures", "clip"), self.shares)[0]
        items = {"picture": (1,), "pictures": self.pictures, "clip": self.patches}[form]
        return Layout(form, rng.choice(self.sizes), rng.choice(items))

    def batch(self, layout: Layout) -> int:
        return max(4, min(self.most, self.budget // layout.tokens))


SMALL: tuple[Size, ...] = ((64, 64), (64, 64), (80, 64), (64, 80), (80, 80))
"""Pictures of 16 to 25 tokens: cheap, and what is learned on them holds for larger ones."""
LARGE: tuple[Size, ...] = (
    *(3 * ((128, 128),)),
    (144, 96),
    (96, 144),
    (160, 96),
    (96, 160),
    (128, 112),
    (112, 128),
    (176, 80),
)
"""What the image processor makes of pictures of common proportions."""
MIXED: tuple[Size, ...] = (*(2 * SMALL), (128, 128), (144, 96), (96, 144))
SEEN: tuple[Size, ...] = (*SMALL, (96, 96), (128, 128))

STAGES = (
    Stage("see", 500, (2.5e-3, 2.5e-3), SEEN, shares=(0.7, 0.0, 0.3), budget=1536, text=False),
    Stage("begin", 469, (2.5e-3, 2.5e-3), SMALL),
    Stage("look", 1200, (2.0e-3, 2.0e-3), SEEN, shares=(0.8, 0.0, 0.2), budget=1536, text=False),
    Stage("small", 750, (2.0e-3, 2.0e-3), MIXED),
    Stage("bind", 450, (2.2e-3, 2.2e-3), SMALL, shares=(0.8, 0.1, 0.1), patches=(2, 3)),
    Stage("words", 1500, (2.0e-3, 2.0e-3), SMALL, shares=(0.6, 0.2, 0.2), budget=640, most=32, frozen=True),
    Stage("mixed", 2500, (2.0e-3, 1.6e-3), MIXED, shares=(0.3, 0.45, 0.25), budget=768, most=32, frozen=True),
    Stage(
        "large",
        2950,
        (1.5e-3, 2.0e-5),
        LARGE,
        shares=(0.4, 0.4, 0.2),
        pictures=(2, 2, 3),
        patches=(2, 4, 4, 8, 12),
        budget=1024,
        most=24,
    ),
)


def stage_at(step: int) -> tuple[Stage, int] | None:
    """The stage of a step and the steps taken in it, or None after the last."""
    for stage in STAGES:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    return None


def rate_at(step: int) -> float:
    found = stage_at(step)
    if found is None:
        return 0.0
    stage, done = found
    first, last = stage.rates
    return (first + (last - first) * done / stage.steps) * min(1.0, (step + 1) / WARMUP)
