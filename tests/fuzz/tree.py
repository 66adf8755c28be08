"""Messages as trees, and mutations of their structure.

A tree is made of lists, dicts, texts, bytes and numbers. The same mutations fit every format: a generator makes a valid
tree, some of its nodes are changed, and only then the format's encoder turns it into bytes. A length in a binary format
is a :class:`Number` like any other, so a mutated number is a length that lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import msgspec

Tree = Any
"""None, bool, int, float, str, bytes, :class:`Number`, or a list or dict of trees."""
Place = tuple[Any, Any]
"""A container and an index or key in it."""
Other = Callable[[], Tree]
"""Returns the tree of another input, to take parts from."""

BOUNDS = sorted({sign * (1 << bits) + near for bits in range(64) for near in (-1, 0, 1) for sign in (1, -1)})
"""Numbers at which bounds lie: the powers of two, and their neighbours. All fit into MessagePack."""
ATOMS = (
    None, True, False, 0, 1, -1, 1 << 63, (1 << 64) - 1, 0.0, 0.5, -1.5, 1e308, "", "a", "\0", "é", "\U0001f40d",
    "a" * 65, "1" * 400, b"", b"\0", b"\xff" * 16, [], [[]], {}, {"a": 1},
)  # fmt: skip
MOST_REPEATS = 400
MOST_DEPTH = 40
MOST_STRETCHED = 1000


@dataclass(slots=True)
class Number:
    """An integer of a binary format: ``width`` bytes, big-endian unless ``little``."""

    value: int
    width: int
    little: bool = False

    def encoded(self) -> bytes:
        """Returns the bytes; a value that does not fit loses its upper bits."""
        value = self.value & ((1 << 8 * self.width) - 1)
        return value.to_bytes(self.width, "little" if self.little else "big")


def fresh(tree: Tree) -> Tree:
    """Returns a copy of a tree that is a constant, to be changed."""
    if isinstance(tree, dict):
        return {key: fresh(value) for key, value in tree.items()}
    return [fresh(item) for item in tree] if isinstance(tree, list | tuple) else tree


# Encoders of formats


def packed(tree: Tree) -> bytes:
    """Returns the nodes of a tree one after another, as binary formats have them."""
    match tree:
        case bytes():
            return tree
        case Number():
            return tree.encoded()
        case list():
            return b"".join(map(packed, tree))
        case dict():
            return b"".join(map(packed, tree.values()))
        case str():
            return tree.encode()
    return str(tree).encode()


def as_msgpack(tree: Tree) -> bytes:
    """Returns a tree as MessagePack."""
    return msgspec.msgpack.encode(tree)


def as_json(tree: Tree) -> bytes:
    """Returns a tree as JSON, which has ``NaN`` and numbers beyond 64 bits as other programs write them."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), default=_plain).encode()


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Number) else value.decode("latin-1")


# Mutations of the structure


def mutate(tree: Tree, chance: Random, other: Other) -> None:
    """Changes one node of ``tree``, which is a list or a dict."""
    places = list(places_of(tree))
    if places:
        chance.choice(MUTATIONS)(chance.choice(places), places, chance, other)


def places_of(tree: Tree) -> Iterator[Place]:
    """Yields the place of every node below the root, parents first."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from places_of(tree[key])


def _bound(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Puts a number at a bound, or next to what it was."""
    numbers = [(box, key) for box, key in places if _is_number(box[key])]
    if numbers:
        box, key = chance.choice(numbers)
        node = box[key]
        was = int(node.value if isinstance(node, Number) else node)
        value = chance.choice((was + 1, was - 1, -was, 2 * was, chance.choice(BOUNDS), chance.choice(BOUNDS)))
        value = max(-(1 << 63), min(value, (1 << 64) - 1))
        box[key] = Number(value, node.width, node.little) if isinstance(node, Number) else value


def _is_number(node: Tree) -> bool:
    return isinstance(node, Number) or (isinstance(node, int) and not isinstance(node, bool))


def _other_type(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Puts a value in place of one of another type."""
    box, key = place
    box[key] = fresh(chance.choice(ATOMS))


def _remove(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    box, key = place
    del box[key]


def _repeat(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Repeats an item of a list, or doubles a field under another name."""
    box, key = place
    if isinstance(box, list):
        times = chance.choice((1, 1, 2, 16, MOST_REPEATS)) if _size(box[key]) < 20 else 1
        box[key:key] = [box[key]] * times
    else:
        box[f"{key}_"] = box[key]


def _swap(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Swaps two fields. One that holds the other goes into itself otherwise, so only its siblings are candidates."""
    box, key = place
    sibling = chance.choice(list(box) if isinstance(box, dict) else range(len(box)))
    box[key], box[sibling] = box[sibling], box[key]


def _splice(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Puts a part of another input here."""
    box, key = place
    parts = list(places_of(other()))
    if parts:
        source, at = chance.choice(parts)
        box[key] = source[at]


def _nest(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    box, key = place
    named = chance.random() < 0.3
    for _ in range(chance.choice((1, 1, 2, MOST_DEPTH))):
        box[key] = {"a": box[key]} if named else [box[key]]


def _stretch(place: Place, places: list[Place], chance: Random, other: Other) -> None:
    """Makes a text or bytes longer or shorter."""
    texts = [(box, key) for box, key in places if isinstance(box[key], str | bytes) and len(box[key]) < MOST_STRETCHED]
    if texts:
        box, key = chance.choice(texts)
        text = box[key]
        at = chance.randrange(len(text) + 1)
        box[key] = chance.choice((text[:at], text[at:], text + text, text[:at] + text, text * 33, text[:at] * 9))


def _size(tree: Tree) -> int:
    return 1 + sum(1 for _ in places_of(tree)) + (len(tree) >> 5 if isinstance(tree, str | bytes) else 0)


MUTATIONS = (_bound, _bound, _other_type, _remove, _repeat, _swap, _splice, _nest, _stretch)
