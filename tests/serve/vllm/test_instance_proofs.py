"""The cluster key between the router and instances of vLLM that have our middleware."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from embferry.serve.http.proofs import ProvedRequests
from embferry.serve.vllm.instance_digests import InstanceDigests
from embferry.serve.vllm.instance_proofs import is_proved
from embferry.trust.digests import CONTENT_DIGEST, LINES, MESSAGE_DIGEST, content_digest
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.requests import INSTANCE
from tests.serve.digested import digested
from tests.serve.vllm.stubs import (
    DONE,
    Network,
    Router,
    Stub,
    events_of,
    picture,
    refused,
    request,
    routed,
    streamed,
    text,
)

pytestmark = pytest.mark.asyncio

KEY = Key.new()
BEARER = {"Authorization": "Bearer k"}
EVERYWHERE = ["/v1/chat/completions", "/v1/models", "/invocations", "/tokenize", "/docs", "/health/../v1/models"]


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", KEY.written())


@dataclass
class Server:
    """``vllm serve`` with the middleware before a stub, as an ASGI application.

    Attributes:
        reached: the requests that have passed the middleware.
        read: whether the middleware has asked for the body of a request.
        forge: what an attacker on the way makes of the answer to a POST.
        spoil: what an attacker on the way makes of a POST.
    """

    stub: Stub
    reached: list[Request] = field(default_factory=list)
    read: bool = False
    forge: Callable[[httpx.Response], httpx.Response] = lambda response: response
    spoil: Callable[[httpx.Request], httpx.Request] = lambda request: request

    def __post_init__(self) -> None:
        self.app = InstanceDigests(self._serve)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = Request(scope, receive)
        self.reached.append(asked)
        inner = httpx.Request(asked.method, str(asked.url), headers=asked.headers.raw, content=await asked.body())
        answer = await Network.handle_async_request(Network(self.stub), inner)
        if "content-length" in answer.headers or not answer.headers.get("content-type"):
            content = await answer.aread()
            await JSONResponse(answer.json() if content else None, answer.status_code)(scope, receive, send)
        else:
            pieces = answer.aiter_bytes()
            await StreamingResponse(pieces, media_type=answer.headers["content-type"])(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted() -> Message:
            self.read = True
            return await receive()

        await self.app(scope, counted, send)

    async def send(self, asked: httpx.Request, auth: httpx.Auth | None = None) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=self)) as client:
            return await client.send(asked, auth=auth)


class Guarded(httpx.AsyncBaseTransport):
    """Routes requests to servers by host."""

    def __init__(self, *servers: Server) -> None:
        self._servers = {server.stub.host: server for server in servers}

    async def handle_async_request(self, asked: httpx.Request) -> httpx.Response:
        server = self._servers[asked.url.host]
        is_chat = asked.method == "POST"
        arrived = server.spoil(asked) if is_chat else asked
        answer = await httpx.ASGITransport(app=server).handle_async_request(arrived)
        return server.forge(answer) if is_chat and answer.status_code == 200 else answer


@contextlib.asynccontextmanager
async def guarded(**more: Any) -> AsyncIterator[tuple[Router, Server, Server]]:
    """Yields a router, an instance that encodes and one that answers."""
    servers = Server(Stub("enc", "encode")), Server(Stub("lang", "language"))
    stubs = [server.stub for server in servers]
    async with routed(*stubs, network=Guarded(*servers), **more) as router:
        yield router, *servers


def proof(key: Key = KEY) -> ProvedRequests:
    return ProvedRequests(ClusterKeys(key), INSTANCE, "http://lang")


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("stream", [False, True])
async def test_the_router_proves_its_requests_and_vllm_finds_the_api_key(stream: bool) -> None:
    async with guarded(router={"api_key": "k"}) as (router, encoder, language):
        answer = await router.ask(request(picture(), text(), stream=stream), **BEARER)
        assert answer.status == 200
        assert b"circle" in answer.body
        assert answer.body.endswith(DONE) == stream
        for server in (encoder, language):
            for asked in server.reached:
                assert asked.headers.getlist("authorization") == ["Bearer k"]
            assert {asked.url.path for asked in server.reached} == {"/health", "/v1/models", "/v1/chat/completions"}


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("cannot decode"), "cannot decode"),
        (ModuleNotFoundError("cannot decode"), "cannot decode"),
        (KeyError(), "KeyError"),
        (OSError(f"cannot open {io.BytesIO()!r}: why"), "cannot open <_io.BytesIO object>: why"),
        (OSError("x" * 1000), "x" * 300 + "…"),
    ],
)
async def test_an_exception_of_vllm_becomes_an_answer_with_a_proof(error: Exception, message: str) -> None:
    """The server's own answer to it would come from outside of the middleware."""

    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    app: Any = InstanceDigests(fails)
    asked = [digested(httpx.Request("POST", "http://lang/v1/chat/completions", content=b"{}")) for _ in range(2)]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False)) as client:
        answer = await client.send(asked[0], auth=proof())
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == message
    assert is_proved(answer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as client:
        with pytest.raises(type(error)):  # for the server's log
            await client.send(asked[1], auth=proof())


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("path", EVERYWHERE)
async def test_strangers_are_refused_before_their_body_is_read(path: str) -> None:
    server = Server(Stub("lang", "language"))
    asked = digested(httpx.Request("POST", f"http://lang{path}", content=b"{}", headers=BEARER))
    answer = await server.send(asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "proof_required")
    with pytest.raises(httpx.RemoteProtocolError, match="another cluster key"):
        await server.send(asked, proof(Key.new()))
    assert server.reached == []
    assert not server.read


@pytest.mark.usefixtures("key")
async def test_a_websocket_is_refused() -> None:
    server, sent = Server(Stub("lang", "language")), []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message["type"])

    await server({"type": "websocket", "path": "/v1/realtime", "headers": []}, receive, send)
    assert sent == ["websocket.close"]
    assert server.reached == []


@pytest.mark.usefixtures("key")
async def test_a_proof_counts_once() -> None:
    server, prover = Server(Stub("lang", "language")), proof()
    first = digested(httpx.Request("POST", "http://lang/v1/chat/completions", content=b"{}"))
    assert (await server.send(first, prover)).status_code == 200
    again = httpx.Request("POST", first.url, headers=first.headers, content=b"{}")
    answer = await server.send(again)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "count_used")
    assert len(server.reached) == 1


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_monitoring_needs_no_proof(path: str) -> None:
    server = Server(Stub("lang", "language"))
    server.app = InstanceDigests(JSONResponse({}))
    assert (await server.send(httpx.Request("GET", f"http://lang{path}"))).status_code == 200


@pytest.mark.usefixtures("key")
async def test_a_refusal_of_vllm_itself_reaches_the_client() -> None:
    async with guarded() as (router, _, language):
        language.stub.behaviours = [refused(401)]
        answer = await router.ask(request(text()))
        assert answer.status == 401
        assert (await router.get("/ready")).json()["workers"] == {"encode": 1, "language": 1}


def without_digest(asked: httpx.Request) -> httpx.Request:
    """Removes the header that says that the body is to be checked, and changes the body."""
    headers = {name: value for name, value in asked.headers.items() if name != MESSAGE_DIGEST.lower()}
    return httpx.Request(asked.method, asked.url, headers=headers, content=asked.content.replace(b"what", b"that"))


def with_new_digests(asked: httpx.Request) -> httpx.Request:
    """Changes the body and gives it the digests of the new one."""
    changed = httpx.Request(asked.method, asked.url, headers=asked.headers, content=asked.content.replace(b"wh", b"th"))
    return digested(changed)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("spoil", [without_digest, with_new_digests])
async def test_a_request_that_was_changed_on_purpose_is_refused(
    spoil: Callable[[httpx.Request], httpx.Request],
) -> None:
    async with guarded() as (router, _, language):
        language.spoil = spoil
        assert (await router.ask(request(text()))).status in (502, 503)
        assert [asked for asked in language.reached if asked.method == "POST"] == []


def stripped_and_changed(answer: httpx.Response) -> httpx.Response:
    """Changes a whole answer, and removes the header that says that it is to be checked."""
    headers = {name: value for name, value in answer.headers.items() if name != MESSAGE_DIGEST.lower()}
    return _with_body(answer, headers)


def digested_again(answer: httpx.Response) -> httpx.Response:
    """Changes a whole answer, and gives it the Content-Digest of its new body."""
    return _with_body(answer, dict(answer.headers) | {CONTENT_DIGEST: content_digest(b'{"forged":1}')})


def _with_body(answer: httpx.Response, headers: dict[str, str]) -> httpx.Response:
    kept = {name: value for name, value in headers.items() if name != "content-length"}
    return httpx.Response(answer.status_code, headers=kept, content=b'{"forged":1}')


def unchecked_stream(answer: httpx.Response) -> httpx.Response:
    """Sends events of its own in place of the checked lines."""
    assert answer.headers["content-type"] == LINES
    headers = {name: value for name, value in answer.headers.items() if name != "content-type"}
    forged = b"".join(events_of("forged"))
    return httpx.Response(200, headers={**headers, "content-type": "text/event-stream"}, content=forged)


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("forge", [stripped_and_changed, digested_again, unchecked_stream])
async def test_a_forged_answer_is_not_used(forge: Callable[[httpx.Response], httpx.Response]) -> None:
    async with guarded() as (router, _, language):
        language.forge = forge
        stream = forge is unchecked_stream
        language.stub.behaviours = [streamed(*events_of("a red circle"))] * 9 if stream else []
        answer = await router.ask(request(text(), stream=stream))
        assert answer.status in (502, 503)
        assert b"forged" not in answer.body


async def test_a_router_without_the_key_finds_no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", KEY.written())
    servers = Server(Stub("enc", "encode")), Server(Stub("lang", "language"))
    monkeypatch.delenv("EMBFERRY_CLUSTER_KEY")
    stubs = [Stub(server.stub.host, server.stub.role, up=False) for server in servers]
    async with routed(*stubs, network=Guarded(*servers)) as router:
        answer = await router.ask(request(picture()))
    assert (answer.status, answer.error["code"]) == (503, "no_worker")
    assert "asks for a cluster key, and this end has none" in answer.error["message"]


@pytest.mark.usefixtures("key")
async def test_an_instance_without_the_key_gets_no_request() -> None:
    encoder, language = Stub("enc", "encode", up=False), Stub("lang", "language", up=False)
    network = Network(Stub("enc", "encode"), Stub("lang", "language"))
    async with routed(encoder, language, network=network) as router:
        answer = await router.ask(request(picture()))
    assert (answer.status, answer.error["code"]) == (503, "no_worker")
    assert "has no cluster key" in answer.error["message"]
    assert "vllm serve needs the middleware" in answer.error["message"]
    assert [stub.requests for stub in network.stubs.values()] == [[], []]
