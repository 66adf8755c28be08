"""Requests of SGLang's load balancer, at workers on the origin's wire."""

from __future__ import annotations

from random import Random

from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.origin.request import parse_origin

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json
from .openai_chat import a_request

SETTINGS = Settings()


class OriginChat(Target):
    documented = (ServeError,)
    nesting = (b'[{"a":', b"}]")
    inputs = 4000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        place = {"bootstrap_host": chance.choice(("10.0.0.1", "[::1]", "h")), "bootstrap_port": 8998, "rid": "r"}
        return a_request(chance) | place | {"bootstrap_room": chance.randrange(1 << 63)}

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        errors = []
        for texts_only in (False, True):
            try:
                asked = parse_origin(b"".join(pieces), SETTINGS, texts_only=texts_only)
            except ServeError as error:
                errors.append(error)
                continue
            assert 0 <= asked.room < 1 << 63
            assert not (texts_only and asked.media), "media for the language side"
            named = [part["item"] for message in asked.messages for part in message["parts"] if "item" in part]
            assert named == list(range(len(asked.media))), "the parts do not name each item once, in order"
        if len(errors) == 2:
            raise errors[0]
