"""Measures the held-out accuracy of an exported model by kind of question: exact match of the whole answer.

    python -m training.shapes.evaluate src/embferry/models/shapes --questions 300

Pictures and videos are drawn anew, larger than the model sees them, with seeds that training never uses. They go
through the image processor and ``generate`` of Hugging Face.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from random import Random

import torch
from PIL import Image

from training.shapes.questions import (
    CLIP_SHARES,
    PICTURE_SHARES,
    PICTURES_SHARES,
    Question,
    ask_clip,
    ask_picture,
    ask_pictures,
)
from training.shapes.scenes import Scene, coded, draw_scene, render
from training.shapes.undivided import Undivided
from training.shapes.video import draw_clip

CANVASES = ((128, 128), (128, 128), (144, 108), (108, 144), (168, 96))
"""Sizes of pictures of about 16,384 pixels; they are drawn two to five times as wide."""
FRAMES = (4, 8, 12, 16, 24)
FPS = 2.0


@dataclass(frozen=True, slots=True)
class Case:
    """A question with its pictures, or with the frames of its video."""

    question: Question
    images: tuple[Image.Image, ...]
    video: bool


def _draw(rng: Random, scenes: Sequence[Scene]) -> tuple[Image.Image, ...]:
    scale, lossy = rng.uniform(2, 5), rng.random() < 0.25
    images = (render(scene, scale) for scene in scenes)
    return tuple(coded(image, 75) if lossy else image for image in images)


def _picture(rng: Random, kind: str) -> Case | None:
    scene = draw_scene(rng, *rng.choice(CANVASES))
    question = ask_picture(rng, scene, kind)
    return Case(question, _draw(rng, [scene]), False) if question else None


def _pictures(rng: Random, kind: str) -> Case | None:
    scenes = [draw_scene(rng, *rng.choice(CANVASES), most=4) for _ in range(rng.choice((2, 2, 3)))]
    question = ask_pictures(rng, scenes, kind)
    return Case(question, tuple(_draw(rng, [scene])[0] for scene in scenes), False) if question else None


def _clip(rng: Random, kind: str) -> Case | None:
    clip = draw_clip(rng, *rng.choice(CANVASES), frames=rng.choice(FRAMES))
    question = ask_clip(rng, clip, kind)
    return Case(question, _draw(rng, clip.frames), True) if question else None


Draw = Callable[[Random, str], Case | None]
FORMS: dict[str, tuple[Draw, dict[str, float]]] = {
    "": (_picture, PICTURE_SHARES),
    "pictures: ": (_pictures, PICTURES_SHARES),
    "video: ": (_clip, CLIP_SHARES),
}
KINDS = {f"{form}{name}": (draw, name) for form, (draw, shares) in FORMS.items() for name in shares}
"""All kinds of question in training, by ``Question.kind``."""


def held_out(kind: str, seed: int = 0) -> Iterator[Case]:
    """Yields cases of one kind of ``KINDS`` without end; the same seed draws the same cases."""
    draw, name = KINDS[kind]
    for number in count():
        case = draw(Random(f"evaluate/{kind}/{seed}/{number}"), name)
        if case is not None:
            yield case


def answer(model: Undivided, case: Case) -> str:
    if case.video:
        return model.ask_video(case.images, FPS, case.question.text)
    return model.ask_pictures(case.images, case.question.text)


def accuracy(model: Undivided, kind: str, questions: int, seed: int = 0) -> float:
    """Returns the share of held-out questions of a kind whose answer is exactly right."""
    cases = islice(held_out(kind, seed), questions)
    return sum(answer(model, case) == case.question.answer for case in cases) / questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--questions", type=int, default=300, help="questions of each kind")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind (may be repeated)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16 instead of float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = Undivided(arguments.directory, torch.bfloat16 if arguments.bfloat16 else torch.float32)
    print("| kind | exact match | n |\n|---|---|---|", flush=True)
    for kind in arguments.kind or KINDS:
        share = accuracy(model, kind, arguments.questions, arguments.seed)
        print(f"| {kind} | {share:.3f} | {arguments.questions} |", flush=True)


if __name__ == "__main__":
    main()
