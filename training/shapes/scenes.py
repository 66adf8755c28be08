"""Scenes of coloured shapes, and how they are drawn.

A scene has plain values, in pixels of the size that the model sees. Drawing it larger and scaling it down gives the
smooth edges of a photograph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, Colour] = {
    "red": (222, 28, 32),
    "orange": (246, 142, 22),
    "yellow": (242, 222, 44),
    "green": (38, 158, 62),
    "blue": (38, 72, 222),
    "purple": (142, 48, 172),
    "black": (14, 14, 14),
    "white": (250, 250, 250),
}
COLOUR_NAMES = tuple(COLOURS)

STAR_INNER = 0.42
"""Inner radius of a star divided by its outer radius."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One coloured shape; ``x``, ``y`` and ``radius`` in pixels, ``turn`` in radians clockwise."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    turn: float
    rgb: Colour

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    def at(self, x: float, y: float) -> Thing:
        return replace(self, x=x, y=y)


@dataclass(frozen=True, slots=True)
class Scene:
    """The content of a picture. Later things lie on top of earlier ones."""

    width: float
    height: float
    ground: Colour
    things: tuple[Thing, ...]


def _near(rgb: Colour, spread: float, rng: Random) -> Colour:
    red, green, blue = (round(min(255.0, max(0.0, value + rng.uniform(-spread, spread)))) for value in rgb)
    return red, green, blue


def draw_ground(rng: Random) -> tuple[Colour, str | None]:
    """Returns a background, and the name of the colour that is invisible on it, if any."""
    pick = rng.random()
    if pick < 0.5:
        return _near((249, 249, 249), 6, rng), "white"
    if pick < 0.7:
        red, green, blue = (rng.randint(198, 255) for _ in range(3))
        return (red, green, blue), "white"
    if pick < 0.87:
        level = rng.randint(98, 182)
        return _near((level, level, level), 10, rng), None
    return _near((12, 12, 12), 10, rng), "black"


def _turn(shape: str, rng: Random) -> float:
    if shape == "square" or rng.random() < 0.7:
        return rng.uniform(-0.26, 0.26)
    return rng.uniform(-math.pi, math.pi)


def radii(width: float, height: float, crowded: bool) -> tuple[float, float]:
    """Returns the smallest and largest radius of a thing in a picture of this size, in pixels."""
    side = math.sqrt(width * height)
    low, high = 3.5 + side / 21, 2.0 + side * 0.175
    return (low, high * 0.8) if crowded else (low, high)


def place(
    things: Sequence[Thing], shape: str, colour: str, size: tuple[float, float], crowded: bool, rng: Random
) -> Thing | None:
    """Returns a thing that touches no other; None if no free place was found."""
    width, height = size
    low, high = radii(width, height, crowded)
    for _ in range(30):
        radius = rng.uniform(low, high)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if all(math.hypot(x - o.x, y - o.y) > 0.95 * (radius + o.radius) for o in things):
            return Thing(shape, colour, x, y, radius, _turn(shape, rng), _near(COLOURS[colour], 16, rng))
    return None


def draw_scene(rng: Random, width: float, height: float, most: int = 5) -> Scene:
    """Returns a scene of up to ``most`` things. Some repeat, so that there is something to count."""
    ground, hidden = draw_ground(rng)
    colours = [name for name in COLOUR_NAMES if name != hidden]
    count = rng.randint(1, most)
    pool = [(rng.choice(SHAPES), rng.choice(colours)) for _ in range(rng.randint(1, 3))]
    things: list[Thing] = []
    for _ in range(count):
        if rng.random() < 0.6:
            shape, colour = rng.choice(pool)
        else:
            shape, colour = rng.choice(SHAPES), rng.choice(colours)
        thing = place(things, shape, colour, (width, height), count > 3, rng)
        if thing is not None:
            things.append(thing)
    return Scene(width, height, ground, tuple(things))


def outline(thing: Thing, scale: float) -> list[tuple[float, float]]:
    """Returns the corners of a polygon in pixels times ``scale``."""
    corners, first = {"square": (4, math.pi / 4), "triangle": (3, -math.pi / 2), "star": (10, -math.pi / 2)}[
        thing.shape
    ]
    points = []
    for corner in range(corners):
        reach = thing.radius * (STAR_INNER if thing.shape == "star" and corner % 2 else 1.0)
        angle = first + thing.turn + corner * 2 * math.pi / corners
        points.append((scale * (thing.x + reach * math.cos(angle)), scale * (thing.y + reach * math.sin(angle))))
    return points


def render(scene: Scene, scale: float) -> Image.Image:
    """Draws a scene at ``scale`` times the size that the model sees."""
    image = Image.new("RGB", (round(scene.width * scale), round(scene.height * scale)), scene.ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        if thing.shape == "circle":
            reach = 0.87 * thing.radius
            box = (thing.x - reach, thing.y - reach, thing.x + reach, thing.y + reach)
            pen.ellipse(tuple(scale * edge for edge in box), fill=thing.rgb)
        else:
            pen.polygon(outline(thing, scale), fill=thing.rgb)
    return image


def coded(image: Image.Image, quality: int) -> Image.Image:
    """Returns a picture after lossy coding."""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def at_model_size(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scales a picture as the image processor does."""
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
