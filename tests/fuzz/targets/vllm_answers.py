"""An answer of an instance of vLLM to the router: events of a stream, a whole completion, the list of its models."""

from __future__ import annotations

from random import Random
from typing import Any

from embferry.serve.http.answers import read_json
from embferry.serve.vllm.failures import VerbatimError
from embferry.serve.vllm.instance import Instance
from embferry.serve.vllm.instance_models import models_of
from embferry.serve.vllm.language_call import EncodeAgainError, _check_complete, _error_event, _has_text, _parse_event

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_json

INSTANCE = Instance("language", "http://192.0.2.1")


class VllmAnswers(Target):
    documented = (EncodeAgainError, VerbatimError, ValueError)
    nesting = (b'[{"choices":', b"}]")
    inputs = 4000

    def tree(self, chance: Random) -> Tree:
        usage = {"prompt_tokens": 3, "completion_tokens": 1}
        delta: dict[str, Any] = chance.choice(({"content": "a"}, {"role": "assistant"}))
        choice = {
            "index": 0,
            "delta": delta,
            "finish_reason": chance.choice((None, "stop")),
            "message": {"content": "a"},
        }
        models = [{"id": "m", "object": "model"}]
        return {"id": "x", "choices": [choice], "usage": usage, "data": models, "object": "chat.completion.chunk"}

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        body = b"".join(pieces)
        errors = []
        for read in (_event, _completion, _listed):
            try:
                read(body)
            except self.documented as error:
                errors.append(error)
        if len(errors) == 3:
            raise errors[0]


def _event(body: bytes) -> None:
    chunk = _parse_event(b"data: " + body)
    if chunk is None:
        raise ValueError("no event")
    if "error" in chunk:
        raise _error_event(INSTANCE, chunk)
    _has_text(INSTANCE, chunk)


def _completion(body: bytes) -> None:
    _check_complete(INSTANCE, body)


def _listed(body: bytes) -> None:
    assert all(isinstance(name, str) for name in models_of(read_json(body))), "a model's name is no text"
