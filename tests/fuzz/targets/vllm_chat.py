"""Requests for ``/v1/chat/completions`` at the router before instances of vLLM."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

from embferry.serve.errors import ServeError
from embferry.serve.vllm.media_parts import media_parts, parse_request, with_parts, without_uuids

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json
from .openai_chat import a_request


class VllmChat(Target):
    documented = (ServeError,)
    nesting = (b'[{"a":', b"}]")
    inputs = 6000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        request = a_request(chance)
        request[chance.choice(("mm_processor_kwargs", "vllm_xargs", "chat_template_kwargs"))] = {"a": 1}
        for message in request["messages"]:
            if isinstance(message["content"], list) and chance.random() < 0.3:
                parts = [part for part in message["content"] if isinstance(part, dict)]
                for part in parts[:1]:
                    part["uuid"] = "of the client"
        return request

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        request = parse_request(b"".join(pieces))
        before = copy.deepcopy(request)
        found = media_parts(request)
        for stripped in (without_uuids(request), with_parts(request, [(media, {"type": "x"}) for media in found])):
            assert not any("uuid" in part for part in _parts(stripped)), "a client's uuid reaches vLLM"
        assert request == before, "the client's request was changed"
        assert "ec_transfer_params" not in {key for key, value in request.items() if value is not None}


def _parts(request: dict[str, Any]) -> list[dict[str, Any]]:
    messages = request.get("messages")
    contents = [message.get("content") for message in _list(messages) if isinstance(message, dict)]
    return [part for parts in contents for part in _list(parts) if isinstance(part, dict)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
