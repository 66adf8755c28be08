"""Messages of the plug-in for SGLang: where a part comes from, who asks for it, what an encoder says of itself."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec

from embferry import LayoutMismatch, RemoteProtocolError
from embferry.connectors.sglang.encoders import Description
from embferry.connectors.sglang.parts import (
    Content,
    Destination,
    EncoderInfo,
    Source,
    decode_source,
    encode_source,
    parse,
)

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_json


class SglangParts(Target):
    documented = (RemoteProtocolError,)
    inputs = 6000

    def tree(self, chance: Random) -> Tree:
        name = chance.randbytes(16).hex()
        info = EncoderInfo(chance.choice(("tcp://10.0.0.7:5555", "tls://[::1]:80")), "bfloat16", 2048)
        part = f"request_local_part_{name}.{chance.randrange(9)}.{chance.randrange(9)}"
        content = Content(chance.randbytes(16).hex(), chance.randbytes(16).hex())
        chosen: list[Any] = [
            Source(name, chance.randrange(9), chance.randrange(9), "http://10.0.0.7:30000", info),
            Destination(part, "10.0.0.8:4000", 2, 0, True, chance.choice((None, content))),
            Description(1, {"IMAGE": info, "VIDEO": info}),
        ]
        tree: Tree = msgspec.to_builtins(chance.choice(chosen))
        return tree

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        text = b"".join(pieces)
        read = [attempt for attempt in (_source, _destination, _description) if attempt(text)]
        if not read:
            raise RemoteProtocolError("none of the messages")


def _source(text: bytes) -> bool:
    try:
        source = decode_source(text.decode(errors="surrogateescape"))
    except (RemoteProtocolError, UnicodeEncodeError):
        return False
    assert decode_source(encode_source(source)) == source, "the message changes when it is written again"
    assert 0 <= source.part_of("a").room(0) < 1 << 63
    return True


def _destination(text: bytes) -> bool:
    try:
        destination = msgspec.json.decode(text, type=Destination)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    part = parse(destination.part)
    assert part is None or part.text == destination.part or parse(part.text) == part
    return True


def _description(text: bytes) -> bool:
    try:
        description = msgspec.json.decode(text, type=Description)
        for info in description.kinds.values():
            info.layout.validate()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LayoutMismatch):
        return False
    return True
