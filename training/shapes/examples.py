"""Draws the pictures and videos of ``examples/media``, and checks the model's answers to the questions about them.

python -m training.shapes.examples examples/media --model src/embferry/models/shapes
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from training.shapes.scenes import COLOURS, Colour, Scene, Thing, render
from training.shapes.undivided import Undivided
from training.shapes.video import DIRECTIONS

WHITE, NIGHT, SKY, SAND, GREY = (250, 250, 248), (14, 14, 18), (214, 232, 250), (250, 236, 214), (136, 138, 140)
VIDEO_RATE = 24
SAMPLED_RATE = 2.0

Placed = tuple[str, str, float, float, float]
"""Colour, shape, and centre and radius as shares of the picture's width, height and mean side."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture, or with ``seconds`` a video whose first thing travels ``travel`` of a frame in ``direction``."""

    size: tuple[int, int]
    ground: Colour
    things: tuple[Placed, ...]
    seconds: float = 0.0
    direction: str = "left"
    travel: float = 0.6

    def scene(self, progress: float = 0.0) -> Scene:
        width, height = self.size
        side = math.sqrt(width * height)
        things = []
        for number, (colour, shape, x, y, radius) in enumerate(self.things):
            way = DIRECTIONS[self.direction] if self.seconds and number == 0 else (0, 0)
            across, down = x + way[0] * self.travel * progress, y + way[1] * self.travel * progress
            things.append(
                Thing(shape, colour, across * width, down * height, radius * side, 0.08 * number, COLOURS[colour])
            )
        return Scene(width, height, self.ground, tuple(things))


DRAWINGS = {
    "garden.png": Drawing(
        (512, 512),
        WHITE,
        (
            ("red", "circle", 0.22, 0.20, 0.12),
            ("blue", "square", 0.76, 0.25, 0.11),
            ("green", "triangle", 0.50, 0.76, 0.13),
        ),
    ),
    "night.png": Drawing(
        (640, 480),
        NIGHT,
        (
            ("yellow", "star", 0.20, 0.24, 0.11),
            ("yellow", "star", 0.52, 0.70, 0.12),
            ("yellow", "star", 0.82, 0.22, 0.10),
            ("white", "circle", 0.84, 0.76, 0.11),
        ),
    ),
    "beach.png": Drawing(
        (800, 450),
        SAND,
        (
            ("orange", "circle", 0.16, 0.22, 0.12),
            ("blue", "triangle", 0.50, 0.62, 0.14),
            ("blue", "triangle", 0.80, 0.50, 0.11),
        ),
    ),
    "market.png": Drawing(
        (600, 600),
        GREY,
        (
            ("red", "square", 0.20, 0.22, 0.10),
            ("red", "square", 0.78, 0.20, 0.10),
            ("green", "circle", 0.50, 0.50, 0.10),
            ("purple", "star", 0.20, 0.80, 0.11),
            ("red", "triangle", 0.80, 0.80, 0.10),
        ),
    ),
    "kite.png": Drawing(
        (480, 640),
        SKY,
        (("purple", "square", 0.50, 0.20, 0.13), ("orange", "star", 0.28, 0.78, 0.12)),
    ),
    "coins.png": Drawing(
        (512, 512),
        WHITE,
        (
            ("green", "circle", 0.22, 0.22, 0.10),
            ("green", "circle", 0.52, 0.48, 0.11),
            ("green", "circle", 0.80, 0.76, 0.10),
            ("green", "circle", 0.76, 0.20, 0.10),
        ),
    ),
    "star-flies.mp4": Drawing(
        (512, 512),
        WHITE,
        (("red", "star", 0.82, 0.28, 0.12), ("blue", "square", 0.30, 0.76, 0.12)),
        seconds=8.0,
        direction="left",
    ),
    "sunrise.mp4": Drawing(
        (640, 480),
        SKY,
        (("orange", "circle", 0.30, 0.82, 0.12), ("green", "triangle", 0.76, 0.72, 0.13)),
        seconds=8.0,
        direction="up",
    ),
}

QUESTIONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("garden.png",), "What colour is the square?", "blue"),
    (("garden.png",), "What shape is red?", "circle"),
    (("garden.png",), "How many triangles are there?", "1"),
    (("garden.png",), "Is there a yellow star?", "no"),
    (("night.png",), "How many yellow stars are there?", "3"),
    (("night.png",), "Is there a white circle?", "yes"),
    (("beach.png",), "How many triangles are there?", "2"),
    (("beach.png",), "What colour is the circle?", "orange"),
    (("market.png",), "How many red squares are there?", "2"),
    (("market.png",), "What shape is purple?", "star"),
    (("kite.png",), "What colour is the star?", "orange"),
    (("coins.png",), "How many circles are there?", "4"),
    (("garden.png", "night.png"), "Which picture has a yellow star?", "picture 2"),
    (("garden.png", "kite.png"), "What shape is orange in picture 2?", "star"),
    (("market.png", "garden.png"), "Is there a green circle in picture 1?", "yes"),
    (("garden.png", "beach.png", "market.png"), "How many pictures have a triangle?", "3"),
    (("star-flies.mp4",), "What is moving?", "the red star"),
    (("star-flies.mp4",), "Which way does the star move?", "left"),
    (("star-flies.mp4",), "How many shapes are there?", "2"),
    (("sunrise.mp4",), "Which shape moves?", "circle"),
    (("sunrise.mp4",), "Which way does the orange circle move?", "up"),
    (("sunrise.mp4",), "What colour is the triangle?", "green"),
)


def write_video(drawing: Drawing, path: Path) -> None:
    """Writes a video as H.264 in MP4, 4:2:0, with ``VIDEO_RATE`` frames in a second."""
    frames = round(drawing.seconds * VIDEO_RATE)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=VIDEO_RATE, options={"crf": "20", "preset": "slow", "threads": "1"}
        )
        stream.width, stream.height = drawing.size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            # Drawing it twice as large gives smooth edges, which make motion of less than a pixel visible.
            image = render(drawing.scene(number / (frames - 1)), 2).resize(drawing.size, Image.Resampling.LANCZOS)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")))
        container.mux(stream.encode())


def sampled_frames(path: Path, fps: float) -> list[Image.Image]:
    """Returns the frames nearest to every 1 / ``fps`` seconds."""
    with av.open(str(path)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    return [frames[round(k * VIDEO_RATE / fps)] for k in range(int(len(frames) * fps / VIDEO_RATE))]


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        if drawing.seconds:
            write_video(drawing, folder / name)
        else:
            image = render(drawing.scene(), 4).resize(drawing.size, Image.Resampling.LANCZOS)
            image.save(folder / name, optimize=True)
    asked = [{"media": list(media), "question": question, "answer": answer} for media, question, answer in QUESTIONS]
    lines = ",\n".join(f"  {json.dumps(question)}" for question in asked)
    (folder / "questions.json").write_text(f"[\n{lines}\n]\n")


def answers(folder: Path, model: Undivided) -> Iterator[tuple[tuple[str, ...], str, str, str]]:
    """Yields media, question, true answer and the model's answer."""
    for media, question, true in QUESTIONS:
        if media[0].endswith(".mp4"):
            given = model.ask_video(sampled_frames(folder / media[0], SAMPLED_RATE), SAMPLED_RATE, question)
        else:
            given = model.ask_pictures([Image.open(folder / name) for name in media], question)
        yield media, question, true, given


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    draw(arguments.folder)
    wrong = 0
    for media, question, true, given in answers(arguments.folder, Undivided(arguments.model)):
        wrong += given != true
        print(
            f"{'ok   ' if given == true else 'WRONG'} {' '.join(media)}: {question} {given}"
            + f" ({true})" * (given != true)
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
