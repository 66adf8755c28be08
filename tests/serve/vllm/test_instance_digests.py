"""Digests between the router and instances of vLLM that have our middleware."""

from __future__ import annotations

import importlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from embferry.serve.http.calls import is_streamed
from embferry.serve.supervisor.vllm import MIDDLEWARE
from embferry.serve.vllm.instance_digests import (
    CONTENT_TYPE,
    InstanceDigests,
    content_type_of,
    received_pieces,
    whole_body,
)
from embferry.trust.digests import LINES, MESSAGE_DIGEST, DamagedError, LineWriter, answer_digest, content_digest
from tests.serve.digested import digested
from tests.serve.vllm.stubs import (
    Behaviour,
    Network,
    Stub,
    answered,
    encoded,
    events_of,
    picture,
    refused,
    request,
    routed,
    streamed,
    text,
)
from tests.trust.test_digests import flips

pytestmark = pytest.mark.asyncio

URL = "http://instance/v1/chat/completions"
PIECES = [b'data: {"a":"\xc3\xa9"}\n\n', b"data: [DONE]\n\n"]


class Instance:
    """``vllm serve`` as far as the middleware sees it. ``asked``, ``types``: the bodies that have reached it."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.types: list[str] = []
        self.app = InstanceDigests(Starlette(routes=[Route("/v1/chat/completions", self._chat, methods=["POST"])]))

    async def _chat(self, request: Request) -> Response:
        self.asked.append(await request.body())
        self.types.append(request.headers.get("content-type", ""))
        if json.loads(self.asked[-1]).get("stream"):

            async def pieces() -> Any:
                for piece in PIECES:
                    yield piece

            return StreamingResponse(pieces(), media_type="text/event-stream")
        return JSONResponse({"choices": []})

    async def send(self, request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self.app)) as client:
            return await client.send(request)


def post(body: dict[str, Any]) -> httpx.Request:
    return httpx.Request("POST", URL, content=json.dumps(body).encode())


def replayed(response: httpx.Response, body: bytes) -> httpx.Response:
    return httpx.Response(
        response.status_code, headers=response.headers, stream=httpx.ByteStream(body), request=response.request
    )


async def test_the_middleware_can_be_imported_by_its_path() -> None:
    module, _, name = MIDDLEWARE.rpartition(".")
    assert getattr(importlib.import_module(module), name) is InstanceDigests


async def test_without_digests_nothing_changes() -> None:
    instance = Instance()
    answer = await instance.send(post({"stream": True}))
    assert answer.content == b"".join(PIECES)
    assert content_type_of(answer).startswith("text/event-stream")
    assert await whole_body(await instance.send(post({}))) == b'{"choices":[]}'


async def test_an_answer_of_the_middleware_is_what_the_instance_said() -> None:
    instance = Instance()
    answer = await instance.send(digested(post({"stream": True})))
    assert is_streamed(answer)
    assert content_type_of(answer).startswith("text/event-stream")
    again = replayed(answer, answer.content)
    assert [piece async for piece in received_pieces(again)] == PIECES
    assert await whole_body(await instance.send(digested(post({})))) == b'{"choices":[]}'


async def test_the_media_type_of_a_request_which_has_no_digest_does_not_matter() -> None:
    instance, asked = Instance(), digested(post({}))
    asked.headers["content-type"] = "application/jsnn"
    assert (await instance.send(asked)).status_code == 200
    assert instance.types == ["application/json"]


async def test_every_flip_of_a_streamed_answer_is_noticed() -> None:
    answer = await Instance().send(digested(post({"stream": True})))
    whole = b"".join(PIECES)
    for changed in flips(answer.content):
        seen = b""
        try:
            async for piece in received_pieces(replayed(answer, changed)):
                seen += piece
        except DamagedError:
            pass
        assert whole.startswith(seen)
        assert seen != whole


@pytest.mark.parametrize("status", [201, 202, 204, 208, 300, 500])
async def test_a_streamed_answer_with_another_status_is_damaged(status: int) -> None:
    answer = await Instance().send(digested(post({"stream": True})))
    answer.status_code = status
    with pytest.raises(DamagedError, match=f"status {status}"):
        await whole_body(replayed(answer, answer.content))


async def test_every_flip_of_a_whole_answer_is_noticed() -> None:
    answer = await Instance().send(digested(post({})))
    for changed in flips(answer.content):
        with pytest.raises(DamagedError):
            await whole_body(replayed(answer, changed))


async def test_a_damaged_request_does_not_reach_the_instance() -> None:
    instance, right = Instance(), digested(post({"picture": "red"}))
    for changed in flips(right.content):
        answer = await instance.send(httpx.Request("POST", URL, headers=right.headers, content=changed))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "body_damaged")
        with pytest.raises(DamagedError):
            await whole_body(replayed(answer, answer.content))
    assert instance.asked == []


# The router


def unchanged(body: bytes) -> bytes:
    return body


def spoilt(body: bytes) -> bytes:
    """Changes an embedding's place, or the head of an answer."""
    return body.replace(b"tcp://", b"tcq://").replace(b"assistant", b"assistent")


def spoilt_end(body: bytes) -> bytes:
    return body.replace(b"circle", b"square")


def through(behaviour: Behaviour, change: Callable[[bytes], bytes] = spoilt) -> Behaviour:
    """Makes a behaviour that of an instance with the middleware; ``change`` is what happens to the body on its way."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        inner = await behaviour(stub, body)
        content, digest = await inner.aread(), stub.headers[-1][MESSAGE_DIGEST]
        if inner.status_code != 200 or not body.get("stream"):
            headers = {"content-digest": content_digest(content)}
            headers |= {MESSAGE_DIGEST: answer_digest(digest, inner.status_code, content_digest(content))}
            return httpx.Response(inner.status_code, headers=headers, content=change(content))
        writer = LineWriter(digest)
        lines = [writer.line(json.dumps(f"{event}\n\n").encode()) for event in content.decode().split("\n\n")[:-1]]
        headers = {"content-type": LINES, CONTENT_TYPE: "text/event-stream"}
        return httpx.Response(200, headers=headers, stream=_Lines(map(change, lines)))

    return behave


class _Lines(httpx.AsyncByteStream):
    """A body that arrives line by line."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self._lines = lines

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for line in self._lines:
            yield line


@pytest.mark.parametrize("role", ["encode", "language"])
@pytest.mark.parametrize("status", [201, 204, 300])
async def test_a_success_of_another_kind_is_no_answer(role: str, status: int) -> None:
    stubs = {"encode": Stub("enc", "encode"), "language": Stub("lang", "language")}
    stubs[role].behaviours = [refused(status)] * 10
    async with routed(*stubs.values()) as router:
        answer = await router.ask(request(picture(), text()))
    assert (answer.status, answer.error["code"]) == (502, "worker_failed")


DAMAGED_REQUEST = through(refused(400, code="body_damaged"), unchanged)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("role", ["encode", "language"])
@pytest.mark.parametrize("is_request", [False, True])
async def test_an_instance_is_asked_once_more(role: str, stream: bool, is_request: bool) -> None:
    stubs = {"encode": Stub("enc", "encode"), "language": Stub("lang", "language")}
    right = encoded() if role == "encode" else answered()
    stubs[role].behaviours = [DAMAGED_REQUEST if is_request else through(right), through(right, unchanged)]
    async with routed(*stubs.values()) as router:
        answer = await router.ask(request(picture(), text(), stream=stream))
        assert answer.status == 200
        assert b"circle" in answer.body
        assert b"assistent" not in answer.body
        assert len(stubs[role].requests) == 2
        assert await router.counted("damaged_messages_total", f'{{role="{role}"}}') == 1


@pytest.mark.parametrize("role", ["encode", "language"])
async def test_the_error_names_the_network(role: str) -> None:
    stubs = {"encode": Stub("enc", "encode"), "language": Stub("lang", "language")}
    stubs[role].behaviours = [DAMAGED_REQUEST] * 10
    async with routed(*stubs.values()) as router:
        answer = await router.ask(request(picture(), text()))
    assert (answer.status, answer.error["code"]) == (502, "worker_failed" if role == "encode" else "network_damage")
    assert "damaged" in answer.error["message"]


class DamagedOnce(Network):
    """Instances with the middleware. The first list of models arrives damaged."""

    def __init__(self, *stubs: Stub) -> None:
        super().__init__(*stubs)
        self.asked = 0

    async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
        answer = await super().handle_async_request(asked)
        if asked.url.path != "/v1/models":
            return answer
        content = await answer.aread()
        headers = {"content-digest": content_digest(content)}
        headers[MESSAGE_DIGEST] = answer_digest(asked.headers[MESSAGE_DIGEST], 200, headers["content-digest"])
        arrived = content if self.asked else content.replace(b"tiny", b"tinz")
        self.asked += 1
        return httpx.Response(200, headers=headers, content=arrived)


async def test_a_damaged_answer_to_a_probe_is_not_used() -> None:
    stubs = Stub("enc", "encode"), Stub("lang", "language")
    network = DamagedOnce(*stubs)
    async with routed(*stubs, network=network) as router:
        found = (await router.get("/v1/models")).json()["data"]
    assert [model["id"] for model in found] == ["tiny"]
    assert network.asked > 2  # once more than there are instances


async def test_a_stream_that_has_begun_ends_with_an_error() -> None:
    encoder, language = Stub("enc", "encode"), Stub("lang", "language")
    language.behaviours = [through(streamed(*events_of("a red circle")), spoilt_end)]
    async with routed(encoder, language) as router:
        answer = await router.ask(request(picture(), text(), stream=True))
    assert answer.status == 200
    assert b"square" not in answer.body
    assert b'"code":"network_damage"' in answer.body
    assert b"[DONE]" not in answer.body
