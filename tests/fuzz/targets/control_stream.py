"""The stream of a control connection: frames with a length and a check, in arrivals of any size; the hello first."""

from __future__ import annotations

from random import Random

from embferry.protocol.errors import EmbeddingTransferError, RemoteProtocolError, VersionMismatch
from embferry.transfer.control.framing import ALL_BITS, HEADER, FrameReader, check
from embferry.transfer.control.handshake import MAGIC, MAX_HELLO, Handshake

from ..doubles import arrivals
from ..engine import Target
from ..raw import Pieces
from ..tree import Number, Tree, packed

LIMIT = 4096


class ControlStream(Target):
    documented = (RemoteProtocolError, VersionMismatch)
    inputs = 8000

    def tree(self, chance: Random) -> Tree:
        hello = [MAGIC, Number(1, 2), Number(chance.randrange(1, 9), 2)]
        payloads = [[chance.randbytes(chance.choice((1, 9, 200)))] for _ in range(chance.randrange(5))]
        return [_framed(parts) for parts in (hello, *payloads)]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        stream = packed(tree)
        return arrivals(stream, [chance.randrange(len(stream) + 1) for _ in range(chance.randrange(4))])

    def run(self, pieces: Pieces) -> None:
        apart, error = _frames(pieces)
        whole, error_of_whole = _frames([b"".join(pieces)])
        assert (apart, str(error)) == (whole, str(error_of_whole)), "the frames depend on how the bytes arrive"
        if error is not None:
            raise error


def _framed(parts: list[Tree]) -> list[Tree]:
    payload = packed(parts)
    length = len(payload)
    return [Number(length, 4), Number(length ^ ALL_BITS, 4), Number(check(payload), 4), parts]


def _frames(pieces: Pieces) -> tuple[list[bytes], EmbeddingTransferError | None]:
    """Reads a connection. Returns the frames after the hello, and the error that ended it."""
    reader, handshake, found = FrameReader(MAX_HELLO), Handshake(), []
    try:
        for piece in pieces:
            for payload in reader.feed(piece):
                if handshake.done:
                    found.append(payload)
                else:
                    handshake.receive(payload)
                    reader.limit = LIMIT
            assert reader.held <= reader.limit + HEADER.size + len(piece), "more is held than a frame"
    except (RemoteProtocolError, VersionMismatch) as error:
        return found, error
    return found, None
