"""Packets between the scheduler and the worker processes of an instance of vLLM."""

from __future__ import annotations

from random import Random

import msgspec

from embferry.connectors.vllm.channel import from_scheduler, from_worker

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_msgpack


class VllmWorkers(Target):
    documented = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
    nesting = (b"\x91", b"")
    inputs = 2000

    def tree(self, chance: Random) -> Tree:
        key, shape = chance.randrange(1 << 40), [chance.randrange(1, 99), 2048, "bfloat16"]
        return chance.choice(
            (
                {"type": "Publish", "mm_hash": "a", "shape": shape, "digest": chance.randbytes(16), "encoded": True},
                {"type": "Enlist", "rank": 3, "secret": chance.randbytes(32).hex()},
                {"type": "Map", "key": key, "shape": shape, "ranks": 2},
                {"type": "Unmap", "key": key},
                {"type": "Done", "key": key, "error": ""},
            )
        )

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_msgpack(tree)]

    def run(self, pieces: Pieces) -> None:
        data = b"".join(pieces)
        try:
            decoder, packet = from_worker, from_worker.decode(data)
        except self.documented:
            decoder, packet = from_scheduler, from_scheduler.decode(data)
        assert decoder.decode(msgspec.msgpack.encode(packet)) == packet, "a packet changes when it is sent again"
