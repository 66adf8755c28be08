"""The list of writes that a sender of the ``http`` transport publishes."""

from __future__ import annotations

from random import Random

import msgspec

from embferry.transports.http.heads import HttpError
from embferry.transports.http.messages import parse_publications
from embferry.transports.windows import MAX_PAYLOAD

from ..engine import Target
from ..raw import Pieces
from ..tree import Number, Tree, as_msgpack, packed

AFTER = 3


class HttpPublications(Target):
    documented = (HttpError,)
    nesting = (b"\x91", b"")
    inputs = 5000

    def tree(self, chance: Random) -> Tree:
        return [_publication(chance, AFTER + 1 + n) for n in range(chance.randrange(5))]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_msgpack([_with_ranges(one) for one in tree] if isinstance(tree, list) else tree)]

    def run(self, pieces: Pieces) -> None:
        publications = parse_publications(b"".join(pieces), AFTER)
        assert parse_publications(msgspec.msgpack.encode(publications), AFTER) == publications
        for publication in publications:
            ranges = publication.parsed_ranges()
            assert sum(ranges[:, 1].tolist()) == publication.length <= MAX_PAYLOAD, "the lengths do not add up"


def _publication(chance: Random, number: int) -> list[Tree]:
    lengths = [chance.randrange(9000) for _ in range(chance.randrange(1, 6))]
    ranges = [[Number(chance.randrange(1 << 40), 8), Number(length, 8)] for length in lengths]
    return [number, chance.randrange(9), f'"{number:x}-a"', sum(lengths), ranges]


def _with_ranges(publication: Tree) -> Tree:
    """Packs the ranges, unless they were moved elsewhere."""
    if isinstance(publication, list):
        return [packed(part) if _has_numbers(part) else part for part in publication]
    return publication.value if isinstance(publication, Number) else publication


def _has_numbers(tree: Tree) -> bool:
    if isinstance(tree, list):
        return any(map(_has_numbers, tree))
    return isinstance(tree, Number) or (isinstance(tree, dict) and any(map(_has_numbers, tree.values())))
