"""A worker's streamed answer: lines with a check, in arrivals of any size. What is accepted is what was sent."""

from __future__ import annotations

from random import Random

from embferry.trust.digests import DamagedError, LineReader, LineWriter

from ..doubles import arrivals
from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_json, packed

REQUEST = "0123456789abcdef0123456789abcdef"


class DigestedLines(Target):
    documented = (DamagedError,)
    inputs = 4000

    def tree(self, chance: Random) -> Tree:
        writer = LineWriter(REQUEST)
        contents = [b"", *[as_json({"type": "token", "text": "a" * chance.randrange(9)})] * chance.randrange(4)]
        return [[writer.line(content)] for content in contents]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = packed(tree)
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4))])

    def run(self, pieces: Pieces) -> None:
        accepted, error = _read(pieces)
        writer = LineWriter(REQUEST)
        sent = b"".join(map(writer.line, accepted))
        assert b"".join(pieces).startswith(sent), "a line is accepted that was not sent like this"
        if error is not None:
            raise error


def _read(pieces: Pieces) -> tuple[list[bytes], DamagedError | None]:
    reader, accepted = LineReader(REQUEST), []
    for piece in pieces:
        try:
            accepted += reader.feed(piece)
        except DamagedError as error:
            return accepted, error
    return accepted, None
