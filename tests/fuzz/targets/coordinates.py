"""Transfer parameters of an instance of vLLM: the coordinates of an embedding, or the room to offer it in."""

from __future__ import annotations

import json
from random import Random

import msgspec

from embferry import LayoutMismatch, RemoteProtocolError
from embferry.connectors.vllm import coordinates
from embferry.connectors.vllm.coordinates import KEY, coordinates_in, failover_token_in, room_request_in

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_json


class Coordinates(Target):
    documented = (RemoteProtocolError,)
    inputs = 8000

    def tree(self, chance: Random) -> Tree:
        if chance.random() < 0.2:
            return {KEY: {"room": chance.randrange(1 << 40)}}
        ours = {
            "endpoint": chance.choice((None, "tcp://10.0.0.7:5555", "tcp://[::1]:80")),
            "room": chance.randrange(1 << 40),
            "tokens": chance.randrange(1, 9999),
            "width": 2048,
            "dtype": "bfloat16",
            "digest": chance.randbytes(16).hex(),
            "version": 1,
            "failover_token": chance.choice((None, "a-token")),
        }
        return {KEY: ours, "metadata": {"image_grid_thw": [[1, 8, 8]]}}

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        try:
            entry = json.loads(b"".join(pieces))  # as vLLM's servers do
        except (ValueError, RecursionError) as error:
            raise RemoteProtocolError(str(error)) from None
        failover_token_in(entry)
        errors = []
        for parse in (coordinates_in, room_request_in):
            try:
                found = parse(entry)
            except RemoteProtocolError as error:
                errors.append(error)
                continue
            again = {KEY: msgspec.to_builtins(found)} if found is not None else None
            assert parse(again) == found, "the parameters change when they are written again"
            if isinstance(found, coordinates.Coordinates):
                _compare(found)
        if len(errors) == 2:
            raise errors[0]


def _compare(given: coordinates.Coordinates) -> None:
    """Compares an embedding with the prompt's room for it, as a consumer does."""
    try:
        there = given.at_prompt(1 if given.tokens is None else given.tokens, given.dtype, 2048)
        assert there.shape.nbytes > 0, "an embedding without bytes"
    except (LayoutMismatch, RemoteProtocolError):
        pass
