"""Requests for ``/v1/chat/completions`` at the router before our own workers."""

from __future__ import annotations

from random import Random
from typing import Any

from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.openai.constraints import constraint_of
from embferry.serve.openai.ignored import Ignored
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
        body, ignored = parse_object(b"".join(pieces)), Ignored()
        request = parse(body, ignored)
        messages, media = parse_messages(request.messages, ignored)
        constraint = constraint_of(body, ignored)
        assert len(str(ignored)) < 4000, "the header is long"
        named = [part["item"] for message in messages for part in message["parts"] if part["type"] != "text"]
        assert named == list(range(len(media))), "the parts do not name each item once, in order"
        assert all(media.urls or media.listed for media in media), "media without a URL"
        sampling = request.sampling(16, constraint)
        assert sampling["max_tokens"] >= 1
        assert 0 <= sampling["temperature"] <= 2
        assert 0 < sampling["top_p"] <= 1


def a_request(chance: Random) -> dict[str, Any]:
    """Returns a valid request: some messages, some of their parts media, and some of the other fields."""
    request: dict[str, Any] = {"model": "m", "messages": [a_message(chance) for _ in range(chance.randrange(1, 4))]}
    options = {name: fresh(value) for name, value in chance.sample(OPTIONS, chance.randrange(5))}
    if "response_format" in options:
        options.pop("structured_outputs", None)  # an answer has one form
    return request | options | ({"stream": True} if "stream_options" in options else {})


def a_message(chance: Random) -> dict[str, Any]:
    if chance.random() < 0.3:
        return {"role": chance.choice(("system", "developer", "user", "assistant", "tool")), "content": "Hello"}
    if chance.random() < 0.2:
        return {"role": "assistant", "content": None, "tool_calls": [fresh(CALL)], "reasoning": "Hm"}
    return {
        "role": chance.choice(("user", "tool")),
        "content": [fresh(chance.choice(PARTS)) for _ in range(chance.randrange(1, 4))],
    }


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
PARTS: tuple[Any, ...] = (
    "Plain",
    {"text": "No type"},
    {"type": "input_text", "text": "?"},
    {"type": "input_image", "image_url": PICTURE},
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
    ("n", 2),
    ("max_tokens", 7.0),
    ("logit_bias", {"5": 1}),
    ("stop_token_ids", [5]),
    ("logprobs", True),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}),
    ("structured_outputs", {"choice": ["a", "b"]}),
    ("temprature", 1),
    ("tools", None),
    ("user", "a name"),
)
