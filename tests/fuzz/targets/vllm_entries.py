"""An encoder's answer to the router before vLLM: the entry of the item, and the part that is made of it."""

from __future__ import annotations

from random import Random

from embferry.serve.vllm.connectors import EmbferryConnector, Encoded, UnusableResponseError
from embferry.serve.vllm.instance import Instance
from embferry.serve.vllm.item_encoder import _only_entry
from embferry.serve.vllm.items import Item

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json

CONNECTOR = EmbferryConnector()
ITEMS = (Item("image", "u", "data:,"), Item("video", "u", "data:,"))


class VllmEntries(Target):
    documented = (UnusableResponseError,)
    nesting = (b"[", b"]")
    inputs = 3000
    bounds = Bounds(memory=256 << 10, calls_per_byte=16)

    def tree(self, chance: Random) -> Tree:
        ours = {
            "endpoint": "tcp://10.0.0.7:5",
            "room": 3,
            "tokens": 9,
            "width": 8,
            "dtype": "bfloat16",
            "digest": "0" * 32,
        }
        metadata = {"image_grid_thw": [[1, 8, 8]], "timestamps": [0.5, 1.0]}
        entry = {"embferry": ours, "metadata": metadata}
        return {"id": "x", "choices": [], "ec_transfer_params": {chance.randbytes(8).hex(): entry}}

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        name, entry = _only_entry(b"".join(pieces))
        CONNECTOR.check(entry)
        encoder = Instance("encode", "http://192.0.2.1")
        for item in ITEMS:
            encoded = Encoded(item, encoder, ("", 0), name, entry)
            assert encoded.part()["uuid"] == "u", "a part without the item's name"
            CONNECTOR.answer_params([encoded])
