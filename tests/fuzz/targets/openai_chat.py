"""Requests for ``/v1/chat/completions`` at the router before our own workers."""

from __future__ import annotations

from random import Random
from typing import Any

from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.openai.messages import parse_messages
from embferry.serve.openai.request import parse

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json, fresh

PICTURE = "data:image/png;base64,AAAA"


class OpenaiChat(Target):
    documented = (ServeError,)
    nesting = (b'[{"a":', b"}]")
    inputs = 8000
    bounds = Bounds(memory=256 << 10)

    def tree(self, chance: Random) -> Tree:
        return a_request(chance)

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        request = parse(parse_object(b"".join(pieces)))
        messages, media = parse_messages(request.messages)
        named = [part["item"] for message in messages for part in message["parts"] if part["type"] != "text"]
        assert named == list(range(len(media))), "the parts do not name each item once, in order"
        assert all(media.urls or media.listed for media in media), "media without a URL"
        sampling = request.sampling(16)
        assert sampling["max_tokens"] >= 1
        assert 0 <= sampling["temperature"] <= 2
        assert 0 < sampling["top_p"] <= 1


def a_request(chance: Random) -> dict[str, Any]:
    """Returns a valid request: some messages, some of their parts media, and some of the other fields."""
    request: dict[str, Any] = {"model": "m", "messages": [a_message(chance) for _ in range(chance.randrange(1, 4))]}
    return request | {name: fresh(value) for name, value in chance.sample(OPTIONS, chance.randrange(5))}


def a_message(chance: Random) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"role": chance.choice(("system", "user", "assistant")), "content": "Hello"}
    return {"role": "user", "content": [fresh(chance.choice(PARTS)) for _ in range(chance.randrange(1, 4))]}


PARTS: tuple[dict[str, Any], ...] = (
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": PICTURE}},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA", "fps": 2}},
)
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("max_tokens", 7),
    ("max_completion_tokens", 9),
    ("temperature", 0.5),
    ("top_p", 1),
    ("seed", -4),
    ("stop", ["a", "b"]),
    ("stream", True),
    ("stream_options", {"include_usage": True}),
    ("n", 1),
    ("tools", None),
    ("user", "a name"),
)
