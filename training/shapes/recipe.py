"""The training recipe as data: stages, sizes and rates.

To change the recipe of a run, stop it, edit a stage that has not begun, and resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from training.shapes.batches import Layout

SEED = 2026
QUESTIONS = 8
"""Questions in one prompt."""
OBJECT_WEIGHT, NUMBER_WEIGHT = 0.4, 0.3
"""Weights of the auxiliary losses; that of the answers is 1."""
WARMUP = 150
AVERAGE = 0.998
"""Decay of the running average of the weights, which is exported."""

Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the training.

    Attributes:
        name: The name in the log.
        steps: Number of batches.
        rates: Learning rate at the start and at the end, linear between.
        sizes: Sizes of pictures in pixels; one of them is drawn for each batch.
        shares: Shares of single pictures, several pictures and clips.
        pictures: Numbers of pictures to draw from, for several pictures.
        patches: Numbers of temporal patches to draw from, for clips.
        budget: Most visual tokens in a batch.
        most: Most prompts in a batch.
        text: Whether questions are asked; otherwise only the auxiliary losses are learned.
        frozen: Whether the vision encoder except its mergers stays as it is, which saves a third of a step.
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
"""Pictures of 16 to 25 tokens, which are cheap and whose lessons hold for larger ones."""
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
"""Sizes to which the image processor scales pictures of common proportions."""
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
    """Returns the stage of a step and the steps taken in it; None after the last stage."""
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
