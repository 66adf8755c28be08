"""An instance whose answers have no end: the router gives up before they fill its memory."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

import httpx
import pytest

from embferry.serve.vllm import instance_digests, language_call
from embferry.serve.vllm.instance_digests import CONTENT_TYPE
from embferry.trust.digests import LINES, MESSAGE_DIGEST, LineWriter
from tests.serve.vllm.stubs import (
    ROLE,
    Behaviour,
    Stub,
    answered,
    encoder_stubs,
    held,
    language_stubs,
    request,
    routed,
    text,
    until,
)

pytestmark = pytest.mark.asyncio

PIECE = b" " * 1000
MOST_BYTES, ENOUGH_BYTES = 50_000, 1_000_000
"""The bound in these tests, and what a router without it would take."""
COMMENT, EMPTY = b": still at work\n\n", b'data: {"choices":[]}\n\n'


class Endless(httpx.AsyncByteStream):
    """The body of an answer. It ends after ``ENOUGH_BYTES``, so that a test of a router without the bound ends, too.

    Attributes:
        taken: bytes so far.
    """

    def __init__(self, next_piece: Callable[[], bytes]) -> None:
        self._next_piece, self.taken = next_piece, 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while self.taken < ENOUGH_BYTES:
            piece = self._next_piece()
            self.taken += len(piece)
            yield piece


def behaving(headers: dict[str, str], make: Callable[[Stub], Callable[[], bytes]], made: list[Endless]) -> Behaviour:
    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        made.append(Endless(make(stub)))
        return httpx.Response(200, headers=headers, stream=made[-1])

    return behave


def lines_of(content: bytes) -> Callable[[Stub], Callable[[], bytes]]:
    """Returns what makes the checked lines of an answer with a body of any length."""
    written = json.dumps(content.decode()).encode()

    def make(stub: Stub) -> Callable[[], bytes]:
        writer = LineWriter(stub.headers[-1][MESSAGE_DIGEST])
        return lambda: writer.line(written)

    return make


EVENTS = {"content-type": "text/event-stream"}
LINED = {"content-type": LINES, CONTENT_TYPE: "text/event-stream"}
LINED_WHOLE = {"content-type": LINES, CONTENT_TYPE: "application/json"}


@pytest.mark.parametrize(
    ("module", "headers", "make", "said"),
    [
        (language_call, EVENTS, lambda stub: lambda: PIECE, "without a token"),
        (language_call, EVENTS, lambda stub: lambda: COMMENT, "without a token"),
        (language_call, EVENTS, lambda stub: lambda: EMPTY, "without a token"),
        (language_call, EVENTS, lambda stub: lambda: ROLE, "without a token"),
        (language_call, LINED, lines_of(COMMENT), "without a token"),
        (instance_digests, LINED_WHOLE, lines_of(PIECE), "its answer has more than 50,000 bytes"),
    ],
    ids=["no event", "comments", "no choices", "roles", "lines with comments", "a whole answer in lines"],
)
async def test_an_answer_without_a_first_token_or_an_end_is_given_up(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, headers: dict[str, str], make: Any, said: str
) -> None:
    monkeypatch.setattr(module, "MAX_COMPLETION_BYTES", MOST_BYTES)
    made: list[Endless] = []
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        language.behaviours = [behaving(headers, make, made)] * 9
        answer = await router.ask(request(text(), stream=headers is not LINED_WHOLE))
    assert (answer.status, answer.error["code"]) == (502, "worker_failed")
    assert said in answer.error["message"]
    assert made
    assert all(one.taken < 4 * MOST_BYTES for one in made)


def in_lines(body: bytes) -> Behaviour:
    """Responds with a whole answer in checked lines."""

    async def behave(stub: Stub, _: dict[str, Any]) -> httpx.Response:
        line = LineWriter(stub.headers[-1][MESSAGE_DIGEST]).line(json.dumps(body.decode()).encode())
        return httpx.Response(200, headers=LINED_WHOLE, stream=httpx.ByteStream(line))

    return behave


LONG = json.dumps({"choices": [{"message": {"content": "x" * MOST_BYTES}, "finish_reason": "stop"}]}).encode()


@pytest.mark.parametrize("long", [answered("x" * MOST_BYTES), in_lines(LONG)], ids=["with a length", "in lines"])
async def test_whole_answers_count_for_the_bytes_of_their_client(long: Behaviour) -> None:
    """A client may ask for many choices in many requests; each answer is held until it is there."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, router={"max_held_bytes_per_client": MOST_BYTES}) as router:
        language.behaviours = [held]
        first = router.call(request(text()))
        await until(lambda: language.holding)
        language.behaviours = [long]
        answer = await router.ask(request(text()))
        assert (answer.status, answer.error["code"]) == (503, "capacity_exhausted")
        assert answer.headers["retry-after"] == "1"
        language.release.set()
        assert (await first.answer()).status == 200
        assert await router.counted("held_bytes", part="process") == 0
        language.behaviours = [long]
        assert (await router.ask(request(text()))).status == 200, "it is the only one of its client"
