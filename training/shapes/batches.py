"""Draws batches: pictures, questions about them, and the labels of every token.

A batch is a pure function of (seed, number, stage), so resumed training sees the same batches as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from training.shapes.architecture import MERGE, PATCH, TEMPORAL, TOKEN_SIDE
from training.shapes.learner import Batch
from training.shapes.questions import (
    CLIP_SHARES,
    PICTURE_SHARES,
    PICTURES_SHARES,
    Question,
    ask,
    ask_clip,
    ask_picture,
    ask_pictures,
)
from training.shapes.scenes import COLOUR_NAMES, SHAPES, Scene, at_model_size, coded, draw_scene, render
from training.shapes.tokenizer import END, IMAGE, START, VIDEO, VISION_END, VISION_START, token_id
from training.shapes.video import DIRECTIONS, draw_clip

IGNORED = -100
LOSSY = 0.25
"""Share of pictures that go through lossy coding."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The common layout of the prompts of one batch. ``size`` is (width, height) in pixels."""

    form: str
    """"picture", "pictures" or "clip"."""
    size: tuple[int, int]
    items: int
    """Number of pictures, or of temporal patches of a clip."""

    @property
    def tokens(self) -> int:
        return self.items * (self.size[0] // TOKEN_SIDE) * (self.size[1] // TOKEN_SIDE)


def timestamps(patches: int, fps: float) -> list[str]:
    """Returns the text before each temporal patch: the mean time of its frames in seconds."""
    return [f"<{(TEMPORAL * k + (TEMPORAL - 1) / 2) / fps:.1f} seconds>" for k in range(patches)]


def prompt(layout: Layout, fps: float) -> str:
    """Returns the prompt up to the question, with expanded placeholders."""
    tokens = layout.tokens // layout.items
    if layout.form == "clip":
        group = f"{VISION_START}{VIDEO * tokens}{VISION_END}"
        return f"{START}user\n" + "".join(stamp + group for stamp in timestamps(layout.items, fps))
    group = f"{VISION_START}{IMAGE * tokens}{VISION_END}"
    labels = [f"Picture {k + 1}: " if layout.items > 1 else "" for k in range(layout.items)]
    return f"{START}user\n" + "".join(label + group for label in labels)


def patchify(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Returns frames [items, T, height, width, 3] as patches [items, N, 3 × T × 64] in the image processor's order."""
    items, depth, height, width, _ = frames.shape
    rows, columns = height // TOKEN_SIDE, width // TOKEN_SIDE
    cut = frames.reshape(items, depth, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    return cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(items, rows * columns * MERGE**2, -1)


def object_labels(scene: Scene, size: tuple[int, int], motion: dict[str, int]) -> NDArray[np.int64]:
    """Returns labels [5, n] of a picture's tokens in the order of ``HEADS``; ``motion`` maps a thing to its label."""
    columns, rows = size[0] // TOKEN_SIDE, size[1] // TOKEN_SIDE
    labels = np.full((5, rows, columns), IGNORED, np.int64)
    labels[:2] = 0
    for thing in scene.things:
        across, down = thing.x / scene.width, thing.y / scene.height
        column, row = min(columns - 1, int(across * columns)), min(rows - 1, int(down * rows))
        third = (min(2, int(3 * down)), min(2, int(3 * across)))
        moved = motion.get(f"{thing.name}/{thing.radius}", 0)
        labels[:, row, column] = (1 + SHAPES.index(thing.shape), 1 + COLOUR_NAMES.index(thing.colour), *third, moved)
    return labels.reshape(5, -1)


@lru_cache(maxsize=64)
def _patch_centres(columns: int, rows: int) -> NDArray[np.float64]:
    """Returns the centres [N, 2] (across, down) of the patches as shares of the picture, in the encoder's order."""
    down, across = np.mgrid[0:rows, 0:columns]
    centres = np.stack(((across + 0.5) / columns, (down + 0.5) / rows), -1)
    blocks = centres.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(-1, 2)


def covered_labels(scene: Scene, size: tuple[int, int]) -> NDArray[np.int64]:
    """Returns labels [N] of the shape that covers the centre of each patch, counted from 1; 0 for the background."""
    centres = _patch_centres(size[0] // PATCH, size[1] // PATCH) * (scene.width, scene.height)
    labels = np.zeros(len(centres), np.int64)
    for thing in scene.things:
        inside = np.hypot(centres[:, 0] - thing.x, centres[:, 1] - thing.y) < 0.85 * thing.radius
        labels[inside] = 1 + SHAPES.index(thing.shape)
    return labels


@dataclass(slots=True)
class Example:
    """One prompt: its pictures [items, T, height, width, 3], labels of its tokens and patches, and its questions."""

    frames: NDArray[np.uint8]
    labels: NDArray[np.int64]
    covered: NDArray[np.int64]
    questions: list[Question]


@dataclass(frozen=True, slots=True)
class Look:
    """Parameters of rendering: ``scale`` times larger, ``stretch`` times wider, coded at ``quality`` (0: not coded)."""

    size: tuple[int, int]
    scale: float
    stretch: float
    quality: int

    @property
    def canvas(self) -> tuple[float, float]:
        """Width and height of the scene. Rounding to whole tokens changes the proportions of a picture."""
        return self.size[0] * self.stretch, float(self.size[1])

    def pixels(self, scene: Scene) -> NDArray[np.uint8]:
        image = render(scene, self.scale)
        if self.quality:
            image = coded(image, self.quality)
        return np.asarray(at_model_size(image, *self.size))


def draw_look(rng: Random, size: tuple[int, int]) -> Look:
    quality = rng.randint(40, 95) if rng.random() < LOSSY else 0
    return Look(size, rng.uniform(1.0, 3.0), rng.uniform(0.87, 1.15), quality)


def _picture(rng: Random, layout: Layout, count: int) -> Example:
    look = draw_look(rng, layout.size)
    scene = draw_scene(rng, *look.canvas)
    return Example(
        look.pixels(scene)[None, None],
        object_labels(scene, layout.size, {}),
        covered_labels(scene, layout.size)[None],
        ask(rng, scene, ask_picture, PICTURE_SHARES, count),
    )


def _pictures(rng: Random, layout: Layout, count: int) -> Example:
    looks = [draw_look(rng, layout.size) for _ in range(layout.items)]
    scenes = [draw_scene(rng, *look.canvas, most=4) for look in looks]
    return Example(
        np.stack([look.pixels(scene) for look, scene in zip(looks, scenes, strict=True)])[:, None],
        np.concatenate([object_labels(scene, layout.size, {}) for scene in scenes], 1),
        np.stack([covered_labels(scene, layout.size) for scene in scenes]),
        ask(rng, scenes, ask_pictures, PICTURES_SHARES, count),
    )


def _clip(rng: Random, layout: Layout, count: int) -> Example:
    look = draw_look(rng, layout.size)
    clip = draw_clip(rng, *look.canvas, frames=TEMPORAL * layout.items)
    moved = {}
    if clip.mover is not None and clip.direction is not None:
        moved = {f"{clip.mover.name}/{clip.mover.radius}": 1 + list(DIRECTIONS).index(clip.direction)}
    if clip.mover is None:
        frames = np.repeat(look.pixels(clip.frames[0])[None], len(clip.frames), 0)
    else:
        frames = np.stack([look.pixels(frame) for frame in clip.frames])
    return Example(
        frames.reshape(layout.items, TEMPORAL, *frames.shape[1:]),
        np.concatenate([object_labels(frame, layout.size, moved) for frame in clip.frames[::TEMPORAL]], 1),
        np.stack([covered_labels(frame, layout.size) for frame in clip.frames[::TEMPORAL]]),
        ask(rng, clip, ask_clip, CLIP_SHARES, count),
    )


DRAW: dict[str, Callable[[Random, Layout, int], Example]] = {
    "picture": _picture,
    "pictures": _pictures,
    "clip": _clip,
}


class Writer:
    """Turns examples into token sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self.encode = lru_cache(maxsize=100_000)(self._encode)
        self.ask_end = self.encode(f"{END}\n{START}assistant\n")
        self.end = token_id(tokenizer, END)
        self.visual = {token_id(tokenizer, IMAGE), token_id(tokenizer, VIDEO)}

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def prefix(
        self, layout: Layout, fps: float
    ) -> tuple[list[int], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Returns what the prompts of a batch have in common.

        Returns:
            Ids [P], positions [3, P + 1] whose last is the start of a question, indices of visual tokens [V], and
            their picture numbers [V].
        """
        ids = list(self.encode(prompt(layout, fps)))
        rows, columns = layout.size[1] // TOKEN_SIDE, layout.size[0] // TOKEN_SIDE
        positions: list[tuple[int, int, int]] = []
        visual: list[int] = []
        numbers: list[int] = []
        place = start = item = 0
        while place < len(ids):
            if ids[place] in self.visual:
                positions += [(start, start + r, start + c) for r in range(rows) for c in range(columns)]
                visual += range(place, place + rows * columns)
                item += 1
                several = layout.form == "pictures" and layout.items > 1
                numbers += [item if several else IGNORED] * (rows * columns)
                place, start = place + rows * columns, start + max(rows, columns)
            else:
                positions.append((start, start, start))
                place, start = place + 1, start + 1
        positions.append((start, start, start))
        return ids, np.array(positions, np.int64).T, np.array(visual, np.int64), np.array(numbers, np.int64)

    def write(self, examples: Sequence[Example], layout: Layout, fps: float) -> Batch:
        """Returns the batch: questions follow their picture, and rows are padded to the longest."""
        ids, positions, visual, numbers = self.prefix(layout, fps)
        rows: list[list[tuple[int, int, int]]] = []
        answers: list[tuple[int, int, int]] = []
        kinds: list[tuple[str, int]] = []
        for number, example in enumerate(examples):
            row: list[tuple[int, int, int]] = []
            for segment, question in enumerate(example.questions, 1):
                asked = (*self.encode(question.text), *self.ask_end)
                answer = (*self.encode(question.answer), self.end)
                first = len(ids) + len(row) + len(asked) - 1
                answers += [(number, first + k, token) for k, token in enumerate(answer)]
                kinds.append((question.kind, len(answer)))
                row += [(token, k, segment) for k, token in enumerate((*asked, *answer[:-1]))]
            rows.append(row)
        length = -(-max(map(len, rows)) // 8) * 8
        start = int(positions[0, -1])
        tail = np.zeros((len(rows), 3, length), np.int64)
        tail[:, 2] = -1
        for number, row in enumerate(rows):
            tail[number, :, : len(row)] = np.array(row, np.int64).T
        head = np.array(ids, np.int64)
        place = np.concatenate(
            [
                np.broadcast_to(positions[:, None, :-1], (3, len(rows), len(ids))),
                start + np.broadcast_to(tail[:, 1], (3, len(rows), length)),
            ],
            2,
        )
        flat = np.array(answers, np.int64)
        grid = (layout.size[1] // PATCH, layout.size[0] // PATCH)
        return Batch(
            patches=torch.from_numpy(patchify(np.concatenate([e.frames for e in examples]))),
            grid=grid,
            ids=torch.from_numpy(np.concatenate([np.broadcast_to(head, (len(rows), len(ids))), tail[:, 0]], 1)),
            positions=torch.from_numpy(place),
            segments=torch.from_numpy(np.concatenate([np.zeros((len(rows), len(ids)), np.int64), tail[:, 2]], 1)),
            visual=torch.from_numpy(visual),
            answers=torch.from_numpy(flat[:, 0] * (len(ids) + length) + flat[:, 1]),
            targets=torch.from_numpy(flat[:, 2].copy()),
            objects=torch.from_numpy(np.concatenate([e.labels for e in examples], 1)),
            numbers=torch.from_numpy(numbers),
            covered=torch.from_numpy(np.concatenate([e.covered for e in examples])),
            kinds=kinds,
        )


def draw_examples(rng: Random, layout: Layout, batch: int, count: int) -> list[Example]:
    """Returns ``batch`` examples with one to ``count`` questions each."""
    examples: list[Example] = []
    while len(examples) < batch:
        example = DRAW[layout.form](rng, layout, count)
        if example.questions:
            examples.append(example)
    return examples
