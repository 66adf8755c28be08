"""A language worker's events, as the router reads them, and the errors that workers report."""

from __future__ import annotations

from random import Random

from embferry.serve.errors import ServeError, from_body
from embferry.serve.http.answers import read_json
from embferry.serve.router.worker_events import parse_event

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_json


class WorkerEvents(Target):
    documented = (ServeError,)
    nesting = (b"[", b"]")
    inputs = 3000

    def tree(self, chance: Random) -> Tree:
        error = {"message": "no", "code": "x", "param": None, "status": 503, "retryable": True}
        return chance.choice(
            (
                {"type": "token", "text": "a", "token_id": 5},
                {"type": "end", "finish_reason": "stop", "usage": {"prompt_tokens": 3}, "transfer": None},
                {"type": "error", "error": error},
                {"type": "ping"},
                {"type": "progress", "tokens": 3, "total_tokens": 5, "transfers": 2, "bytes": 9, "transport": "shm"},
            )
        )

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_json(tree)]

    def run(self, pieces: Pieces) -> None:
        line = b"".join(pieces)
        event = parse_event(line)
        if event["type"] == "error":
            reported = from_body(read_json(line), 502)
            assert 400 <= reported.http_status <= 599, "an error without a status"
            assert reported.body(), "an error without a body"
