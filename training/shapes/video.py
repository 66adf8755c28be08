"""Short videos in which one thing, or nothing, moves in a straight line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from training.shapes.scenes import Scene, Thing, draw_scene

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

LEAST_STEP = 2.2
"""Least distance in pixels of a moving thing between two frames that the vision encoder can see."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames in order; ``mover`` is the moving thing at its start, ``direction`` a key of ``DIRECTIONS``."""

    frames: tuple[Scene, ...]
    mover: Thing | None
    direction: str | None

    @property
    def things(self) -> tuple[Thing, ...]:
        return self.frames[0].things


def _path(
    thing: Thing, way: tuple[int, int], size: tuple[float, float], frames: int, rng: Random
) -> list[Thing] | None:
    """Returns the thing in every frame; None if the picture is too small for such a path."""
    axis = 0 if way[0] else 1
    room = size[axis] - 2 * thing.radius
    least = LEAST_STEP * (frames - 1)
    if room < least:
        return None
    span = rng.uniform(min(room, max(least, 0.3 * size[axis])), room)
    low = rng.uniform(thing.radius, size[axis] - thing.radius - span)
    steps = [span * k / (frames - 1) for k in range(frames)]
    places = [low + step for step in (steps if way[axis] > 0 else reversed(steps))]
    return [thing.at(p, thing.y) if axis == 0 else thing.at(thing.x, p) for p in places]


def _clear(other: Thing, path: list[Thing]) -> bool:
    """Returns whether a still thing is clear of the path of a moving one."""
    first, last, reach = path[0], path[-1], 0.95 * (other.radius + path[0].radius)
    x = min(max(other.x, min(first.x, last.x)), max(first.x, last.x))
    y = min(max(other.y, min(first.y, last.y)), max(first.y, last.y))
    return (other.x - x) ** 2 + (other.y - y) ** 2 > reach**2


def draw_clip(rng: Random, width: float, height: float, frames: int, most: int = 4, still: float = 0.1) -> Clip:
    """Returns a clip in which one thing moves, or none in a share ``still`` of the clips."""
    scene = draw_scene(rng, width, height, most)
    while not scene.things:
        scene = draw_scene(rng, width, height, most)
    if rng.random() < still:
        return Clip((scene,) * frames, None, None)
    mover = rng.choice(scene.things)
    ways = list(DIRECTIONS)
    rng.shuffle(ways)
    for way in ways:
        path = _path(mover, DIRECTIONS[way], (width, height), frames, rng)
        if path is not None:
            others = tuple(o for o in scene.things if o is not mover and _clear(o, path))
            return Clip(tuple(replace(scene, things=(*others, spot)) for spot in path), path[0], way)
    return Clip((scene,) * frames, None, None)
