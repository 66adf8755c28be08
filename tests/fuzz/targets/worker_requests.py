"""The router's requests to the workers: ``POST /encode`` in MessagePack, ``POST /generate`` in JSON."""

from __future__ import annotations

from random import Random

import msgspec

from embferry.engine.errors import EngineError
from embferry.serve.encode import messages as encode
from embferry.serve.errors import ServeError
from embferry.serve.language import messages as language
from embferry.serve.worker.errors import decoded

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json, as_msgpack


class WorkerRequests(Target):
    documented = (ServeError,)
    nesting = (b"[", b"]")
    inputs = 5000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        kind = chance.choice(("image", "video"))
        if chance.random() < 0.5:
            video = [{"kind": "video", "frames": [b"1", b"2"], "fps": 2.0}] if kind == "video" else []
            items = [{"kind": "image", "data": chance.randbytes(9)}, *video]
            return {"room": chance.randrange(1 << 40), "request_id": "r", "items": items}
        item = {"kind": kind, "grid_thw": [1, 8, 8], "num_tokens": 16, "digest": "00ff", "timestamps": [0.5]}
        parts = [{"type": "text", "text": "?"}, {"type": kind, "item": 0}]
        sampling = {"max_tokens": 3, "temperature": 0.5, "top_p": 1, "seed": 4, "stop": ["x"]}
        return {
            "request_id": "r",
            "messages": [{"role": "user", "parts": parts}],
            "room": 5,
            "endpoint": "tcp://h:9",
            "items": [item],
            "sampling": sampling,
        }

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree) if "messages" in tree else as_msgpack(tree)]

    def run(self, pieces: Pieces) -> None:
        body = b"".join(pieces)
        if not body.lstrip().startswith(b"{"):
            request = decoded(encode.DECODER, body)
            assert encode.DECODER.decode(msgspec.msgpack.encode(request)) == request
            return
        generate = decoded(language.DECODER, body)
        assert language.DECODER.decode(msgspec.json.encode(generate)) == generate
        assert len(generate.shapes) == len(generate.items)
        assert len(generate.chat) == len(generate.messages)
        try:
            assert generate.sampling.params(256)
        except EngineError as error:
            raise ServeError("invalid_request", str(error)) from None
