"""Messages of the origin's wire as ZeroMQ frames: registrations, requests and statuses."""

from __future__ import annotations

import struct
from random import Random

from embferry.disaggregation.wire.messages import (
    EmbeddingStatus,
    Generation,
    OriginWire,
    read,
    read_init_head,
    read_status,
    write,
    write_status,
)
from embferry.protocol.errors import RemoteProtocolError
from embferry.protocol.states import KVPoll

from ..engine import Target
from ..raw import Pieces
from ..tree import BOUNDS, Number, Tree, packed

WIRES = (OriginWire(64, 8), OriginWire(64, 8, Generation.V3_0), OriginWire(1 << 20, 64, num_buffers=5))
ROOMS = [bound for bound in BOUNDS if 0 <= bound < 1 << 63]


class OriginFrames(Target):
    documented = (RemoteProtocolError,)
    inputs = 8000

    def tree(self, chance: Random) -> Tree:
        room, head = str(chance.choice(ROOMS)), ["127.0.0.1", str(chance.randrange(1, 65536)), "host:20001"]
        if chance.random() < 0.2:
            return [room, str(chance.randrange(5)), *([str(chance.randrange(-1, 9))] if chance.random() < 0.5 else [])]
        if chance.random() < 0.3:
            pointers = [chance.randrange(1, 1 << 47) for _ in range(chance.choice((4, 5)))]
            return ["None", *head, struct.pack(f"={len(pointers)}Q", *pointers)]
        blocks = chance.sample(range(64), chance.randrange(1, 6))
        indices = [part for block in blocks for part in (str(block), ",")][:-1]
        resumed = [str(8 * chance.randrange(1, 99))] if chance.random() < 0.5 else []
        return [room, *head, indices, "1", *resumed, str(8 * len(blocks))]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(str(frame.value) if isinstance(frame, Number) else frame) for frame in tree]

    def run(self, pieces: Pieces) -> None:
        errors = []
        for wire in WIRES:
            try:
                message = read(pieces, wire)
            except RemoteProtocolError as error:
                errors.append(error)
                if (head := read_init_head(pieces)) is not None:  # its receiver is told
                    write_status(EmbeddingStatus(head.room, KVPoll.Failed))
            else:
                assert read(write(message, wire), wire) == message, "a message changes when it is written again"
        try:
            status = read_status(pieces)
        except RemoteProtocolError as error:
            errors.append(error)
        else:
            again = read_status(write_status(status))
            assert (again.room, again.status) == (status.room, status.status), "a status changes"
        if len(errors) == len(WIRES) + 1:
            raise errors[0]
