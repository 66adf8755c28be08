"""Questions and their true answers.

A kind of question is a function that takes what was drawn and returns a question, or None if this kind cannot be asked
about it. The tables at the end list every kind with its share in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from training.shapes.scenes import COLOUR_NAMES, SHAPES, Scene, Thing
from training.shapes.video import Clip


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    answer: str


Asked = tuple[str, str]
"""A question and its answer in words."""

PLACES = (("top left", "top", "top right"), ("left", "center", "right"), ("bottom left", "bottom", "bottom right"))
EDGE = 0.16
"""No question asks for the place of a thing whose centre is closer to the next place, in thirds of the picture."""

COUNT = ("how many {what} are there{place}?", "how many {what} do you see{place}?", "count the {what}{place}.")
COLOUR = (
    "what {colour} is the {what}{place}?",
    "which {colour} is the {what}{place}?",
    "what is the {colour} of the {what}{place}?",
)
SHAPE = ("what shape is {what}{place}?", "which shape is {what}{place}?", "what is the {what} shape{place}?")
EXISTS = ("is there {what}{place}?", "do you see {what}{place}?", "can you see {what}{place}?")
WHERE = ("where is the {what}?", "where in the picture is the {what}?", "in which part of the picture is the {what}?")
WHICH = ("which picture has {what}?", "which picture shows {what}?", "in which picture is {what}?")
PICTURES = ("how many pictures have {what}?", "how many pictures show {what}?", "how many of the pictures have {what}?")
MOVING = ("what is moving?", "what moves?", "which thing moves?", "what moves in the video?")
DIRECTION = ("which way does {what} move?", "in which direction does {what} move?", "where does {what} move?")
MOVER = ("what {colour} is the moving shape?", "which {colour} is the shape that moves?")
WHICH_SHAPE_MOVES = ("which shape moves?", "which shape is moving?", "what shape is moving?")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _say(rng: Random, templates: Sequence[str], what: str = "", place: str = "") -> str:
    return rng.choice(templates).format(what=what, place=place, colour=rng.choice(("colour", "color")))


def _single(things: Iterable[Thing], of: Callable[[Thing], str]) -> list[Thing]:
    """Returns the things whose colour (or shape, or name) no other thing has."""
    seen: dict[str, list[Thing]] = {}
    for thing in things:
        seen.setdefault(of(thing), []).append(thing)
    return [group[0] for group in seen.values() if len(group) == 1]


def _pick_name(rng: Random, things: Sequence[Thing], there: float) -> tuple[str, str]:
    """Returns the colour and shape of a thing that is there, or is similar to one."""
    seen, other = rng.choice(things), rng.choice(things)
    pick = rng.random()
    if pick < there:
        return seen.colour, seen.shape
    if pick < there + (1 - there) * 0.4:
        return seen.colour, other.shape
    if pick < there + (1 - there) * 0.7:
        return seen.colour, rng.choice(SHAPES)
    return rng.choice(COLOUR_NAMES), other.shape


def colour_of(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    single = _single(things, lambda o: o.shape)
    if not single:
        return None
    thing = rng.choice(single)
    return _say(rng, COLOUR, thing.shape, place), thing.colour


def shape_of(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    single = _single(things, lambda o: o.colour)
    if not single:
        return None
    thing = rng.choice(single)
    return _say(rng, SHAPE, thing.colour, place), thing.shape


def count_named(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    colour, shape = _pick_name(rng, things, 0.8)
    count = sum(o.colour == colour and o.shape == shape for o in things)
    return _say(rng, COUNT, f"{colour} {shape}s", place), str(count)


def count_shape(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    shape = rng.choice(things).shape if rng.random() < 0.85 else rng.choice(SHAPES)
    return _say(rng, COUNT, f"{shape}s", place), str(sum(o.shape == shape for o in things))


def count_colour(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    colour = rng.choice(things).colour if rng.random() < 0.85 else rng.choice(COLOUR_NAMES)
    what = f"{colour} {rng.choice(('shapes', 'things'))}"
    return _say(rng, COUNT, what, place), str(sum(o.colour == colour for o in things))


def count_all(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    return _say(rng, COUNT, rng.choice(("shapes", "things")), place), str(len(things))


def exists(rng: Random, things: Sequence[Thing], place: str) -> Asked | None:
    colour, shape = _pick_name(rng, things, 0.4)
    there = any(o.colour == colour and o.shape == shape for o in things)
    return _say(rng, EXISTS, _article(f"{colour} {shape}"), place), "yes" if there else "no"


OF_THINGS: dict[str, Callable[[Random, Sequence[Thing], str], Asked | None]] = {
    "colour of": colour_of,
    "shape of": shape_of,
    "how many of a name": count_named,
    "how many of a shape": count_shape,
    "how many of a colour": count_colour,
    "how many": count_all,
    "is there": exists,
}


def where(rng: Random, scene: Scene) -> Asked | None:
    """Asks in which ninth of the picture the centre of a thing is."""
    single = _single(scene.things, lambda o: o.name)
    rng.shuffle(single)
    for thing in single:
        across, down = 3 * thing.x / scene.width, 3 * thing.y / scene.height
        if min(abs(across - 1), abs(across - 2), abs(down - 1), abs(down - 2)) >= EDGE:
            return _say(rng, WHERE, thing.name), PLACES[min(2, int(down))][min(2, int(across))]
    return None


def _noun(rng: Random, things: Sequence[Thing]) -> tuple[str, Callable[[Thing], bool]]:
    """Returns words for a thing, by name, shape or colour, and the test whether a thing fits them."""
    thing, pick = rng.choice(things), rng.random()
    if pick < 0.5:
        return thing.name, lambda o: o.name == thing.name
    if pick < 0.75:
        return thing.shape, lambda o: o.shape == thing.shape
    return f"{thing.colour} shape", lambda o: o.colour == thing.colour


def which_picture(rng: Random, scenes: Sequence[Scene]) -> Asked | None:
    everything = [o for scene in scenes for o in scene.things]
    for _ in range(4):
        what, test = _noun(rng, everything)
        having = [number for number, scene in enumerate(scenes, 1) if any(map(test, scene.things))]
        if len(having) == 1:
            return _say(rng, WHICH, _article(what)), f"picture {having[0]}"
    return None


def how_many_pictures(rng: Random, scenes: Sequence[Scene]) -> Asked | None:
    what, test = _noun(rng, [o for scene in scenes for o in scene.things])
    count = sum(any(map(test, scene.things)) for scene in scenes)
    return _say(rng, PICTURES, _article(what)), str(count)


def moving(rng: Random, clip: Clip) -> Asked | None:
    return _say(rng, MOVING), f"the {clip.mover.name}" if clip.mover else "nothing"


def direction(rng: Random, clip: Clip) -> Asked | None:
    if clip.mover is None or clip.direction is None:
        return None
    names = ["it", "the moving shape"]
    for words, of in ((clip.mover.name, "name"), (clip.mover.shape, "shape")):
        if sum(getattr(o, of) == getattr(clip.mover, of) for o in clip.things) == 1:
            names.append(f"the {words}")
    return _say(rng, DIRECTION, rng.choice(names)), clip.direction


def moving_colour(rng: Random, clip: Clip) -> Asked | None:
    return (_say(rng, MOVER), clip.mover.colour) if clip.mover else None


def moving_shape(rng: Random, clip: Clip) -> Asked | None:
    return (_say(rng, WHICH_SHAPE_MOVES), clip.mover.shape) if clip.mover else None


OF_CLIP: dict[str, Callable[[Random, Clip], Asked | None]] = {
    "what moves": moving,
    "direction": direction,
    "colour of what moves": moving_colour,
    "shape of what moves": moving_shape,
}
OF_PICTURES: dict[str, Callable[[Random, Sequence[Scene]], Asked | None]] = {
    "which picture": which_picture,
    "how many pictures": how_many_pictures,
}

PICTURE_SHARES = {
    "colour of": 1.0,
    "shape of": 1.0,
    "how many of a name": 3.0,
    "how many of a shape": 2.5,
    "how many of a colour": 2.0,
    "how many": 2.0,
    "is there": 1.0,
    "where": 5.0,
}
CLIP_SHARES = {
    "what moves": 2.0,
    "direction": 2.0,
    "colour of what moves": 1.0,
    "shape of what moves": 1.0,
    "colour of": 1.0,
    "shape of": 1.0,
    "how many": 1.0,
    "how many of a shape": 0.5,
    "how many of a colour": 0.5,
    "is there": 1.0,
}
PICTURES_SHARES = {
    "which picture": 1.0,
    "how many pictures": 3.0,
    "colour of": 4.0,
    "shape of": 1.0,
    "is there": 1.0,
}


def ask_picture(rng: Random, scene: Scene, kind: str) -> Question | None:
    if kind == "where":
        asked = where(rng, scene)
    else:
        asked = OF_THINGS[kind](rng, scene.things, rng.choice(("", "", " in the picture")))
    return Question(kind, *asked) if asked else None


def ask_clip(rng: Random, clip: Clip, kind: str) -> Question | None:
    if kind in OF_CLIP:
        asked = OF_CLIP[kind](rng, clip)
    else:
        asked = OF_THINGS[kind](rng, clip.things, rng.choice(("", "", " in the video")))
    return Question(f"video: {kind}", *asked) if asked else None


def ask_pictures(rng: Random, scenes: Sequence[Scene], kind: str) -> Question | None:
    if kind in OF_PICTURES:
        asked = OF_PICTURES[kind](rng, scenes)
    else:
        number = rng.randrange(len(scenes))
        asked = OF_THINGS[kind](rng, scenes[number].things, f" in picture {number + 1}")
    return Question(f"pictures: {kind}", *asked) if asked else None


Seen = TypeVar("Seen")


def ask(
    rng: Random, seen: Seen, one: Callable[[Random, Seen, str], Question | None], shares: dict[str, float], count: int
) -> list[Question]:
    """Returns up to ``count`` different questions about what was drawn."""
    kinds, weights = list(shares), list(shares.values())
    asked: dict[str, Question] = {}
    for kind in rng.choices(kinds, weights, k=3 * count):
        question = one(rng, seen, kind)
        if question is not None:
            asked.setdefault(question.text, question)
        if len(asked) == count:
            break
    return list(asked.values())
