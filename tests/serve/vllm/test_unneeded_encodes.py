"""An encode that no request needs any more ends at the encoder; one that another request needs goes on."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from embferry.serve.vllm.failover import Failover
from embferry.serve.vllm.received_cache import _SharedEncode
from tests.serve.vllm.stubs import (
    Call,
    Router,
    Stub,
    encoded,
    encoder_stubs,
    held,
    language_stubs,
    picture,
    refused,
    request,
    routed,
    text,
    until,
)
from tests.serve.vllm.test_received_cache import answering, ask_for

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("received_bytes", [0, 1 << 20])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_ends_all_its_encodes(received_bytes: int, stream: bool) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [held, held]
    async with routed(encoder, language, received_bytes=received_bytes) as router:
        call = router.call(request(picture(b"a"), picture(b"b"), stream=stream))
        await until(lambda: len(encoder.requests) == 2)
        call.leave()
        await call.task
        await until(lambda: encoder.left == 2)
        assert await router.counted("chat_aborted_total") == 1
        assert await in_flight(router, "encode") == 0
        assert (await router.ask(request(picture(b"a")))).status == 200
    assert len(language.requests) == 1


async def test_a_request_whose_time_is_over_ends_its_encode() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [held]
    async with routed(encoder, language, router={"request_timeout": 0.05}) as router:
        answer = await router.ask(request(picture()))
        assert (answer.status, answer.error["code"]) == (504, "request_timeout")
        await until(lambda: encoder.left == 1)


async def test_an_item_that_is_refused_ends_the_encodes_of_the_others() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [held, refused(400)]
    async with routed(encoder, language) as router:
        assert (await router.ask(request(picture(b"a"), picture(b"b")))).status == 400
        await until(lambda: encoder.left == 1)


async def sharing(router: Router, encoder: Stub) -> list[Call]:
    """Returns three requests that wait for one encode."""
    encoder.behaviours = [held]
    first = router.call(request(picture()))
    await until(lambda: encoder.requests)
    others = [router.call(request(picture(), text(str(number)))) for number in range(2)]
    await until(lambda: in_flight(router, "language", 3))
    return [first, *others]


async def test_a_shared_encode_goes_on_while_a_request_wants_it() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        first, *others = await sharing(router, encoder)
        for call in (first, others[0]):
            call.leave()
            await call.task
        assert (len(encoder.requests), encoder.left) == (1, 0)
        encoder.release.set()
        assert (await others[1].answer()).status == 200
        assert len(encoder.requests) == 1
        assert (await router.ask(request(picture()))).status == 200
        assert len(encoder.requests) == 1


async def test_a_shared_encode_ends_when_the_last_request_has_left() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        for call in await sharing(router, encoder):
            assert encoder.left == 0
            call.leave()
            await call.task
        await until(lambda: encoder.left == 1)
        encoder.behaviours = [held]
        late = router.call(request(picture()))  # begins one of its own
        await until(lambda: len(encoder.requests) == 2)
        encoder.release.set()
        assert (await late.answer()).status == 200


async def test_a_request_does_not_wait_for_an_encode_that_is_being_cancelled() -> None:
    """It arrives in the very turn of the event loop in which the last one leaves."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        calls = await sharing(router, encoder)
        for call in calls:
            call.leave()
        late = router.call(request(picture()))
        assert (await late.answer()).status == 200
        await asyncio.gather(*(call.task for call in calls))


async def test_a_failed_encode_is_tried_once_more_for_the_requests_that_shared_it() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)

    async def fails(stub: Stub, body: dict[str, Any]) -> Any:
        await stub.release.wait()
        return await encoded(embferry=None)(stub, body)

    async with routed(encoder, language) as router:
        encoder.behaviours = [fails, fails]
        calls = [router.call(request(picture(), text(str(number)))) for number in range(4)]
        await until(lambda: in_flight(router, "language", 4))
        encoder.release.set()
        answers = [await call.answer() for call in calls]
    assert [answer.status for answer in answers] == [502] * 4
    assert len(encoder.requests) == 2


async def test_an_encode_that_the_consumer_has_asked_for_ends_with_the_request() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            encoder.behaviours = [held]
            asking = asyncio.create_task(ask_for(router, where))
            await until(lambda: len(encoder.requests) == 2)
            call.leave()
            await call.task
            await until(lambda: encoder.left == 1)
            answer = await asking
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
            assert "the request has ended" in answer.error["message"]


async def test_an_encode_that_the_consumer_has_asked_for_goes_on_while_another_request_waits_for_the_item() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            language.behaviours = [held]
            other = router.call(request(picture(), text("more")))
            await until(lambda: len(language.requests) == 3)
            encoder.behaviours = [held]
            asking = asyncio.create_task(ask_for(router, where))
            await until(lambda: len(encoder.requests) == 2)
            call.leave()
            await call.task
            assert encoder.left == 0
            encoder.release.set()
            assert (await asking).json()["embferry"]["endpoint"] == "tcp://enc0:1"
            language.release.set()
            assert (await other.answer()).status == 200


async def test_nothing_is_encoded_for_a_request_that_has_ended() -> None:
    """The consumer's call waits for the lock of the transfer while its request ends."""
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture()))
        async with answering(router, language) as (call, where):
            encoder.behaviours = [held, held]
            asking = [asyncio.create_task(ask_for(router, where)) for _ in range(2)]
            await until(lambda: len(encoder.requests) == 2)
            call.leave()
            await call.task
            assert [(await one).status for one in asking] == [503, 503]
    assert len(encoder.requests) == 2


async def test_a_slow_encoder_loses_its_connection_when_the_time_is_over() -> None:
    """Over sockets: the encoder sees the end of the connection, and the item goes to the other one."""
    closed: list[asyncio.Event] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET /health"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif head.startswith(b"GET /v1/models"):
            body = b'{"data": [{"id": "tiny", "object": "model"}]}'
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        else:
            closed.append(asyncio.Event())
            while await reader.read(65536):
                pass
            closed[-1].set()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server:
        address = "{}:{}".format(*server.sockets[0].getsockname())
        slow, (language,) = Stub(address, "encode"), language_stubs(1)
        network = Sockets(language)
        async with routed(slow, language, network=network, encode_timeout=0.2) as router:
            answer = await router.ask(request(picture()))
            assert (answer.status, answer.error["code"]) == (503, "no_worker")
            for event in closed:
                await asyncio.wait_for(event.wait(), 10)
            assert closed
            network_calls = len(closed)
            call = router.call(request(picture(b"other")))
            await until(lambda: len(closed) > network_calls)
            call.leave()
            await call.task
            await asyncio.wait_for(closed[-1].wait(), 10)


class Sockets(httpx.AsyncBaseTransport):
    """Takes requests to stubs, or to real sockets where there is no stub."""

    def __init__(self, *stubs: Stub) -> None:
        from tests.serve.vllm.stubs import Network

        self._stubs, self._sockets = Network(*stubs), httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        taken = self._stubs if request.url.host in self._stubs.stubs else self._sockets
        return await taken.handle_async_request(request)


# Mutants


async def test_the_last_request_must_end_the_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    async def result(shared: _SharedEncode) -> Any:
        return await asyncio.shield(shared._task)

    monkeypatch.setattr(_SharedEncode, "result", result)
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    encoder.behaviours = [held]
    async with routed(encoder, language) as router:
        call = router.call(request(picture()))
        await until(lambda: encoder.requests)
        call.leave()
        await call.task
        for _ in range(10):
            await asyncio.sleep(0)
        assert encoder.left == 0  # nothing has told the encoder
        encoder.release.set()


async def test_only_the_last_transfer_may_end_an_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    def let_go(failover: Failover, item: Any) -> None:
        for encoding in failover._encoding.pop(item.uuid, ()):
            encoding.cancel()

    monkeypatch.setattr(Failover, "_let_go", let_go)
    with pytest.raises((AssertionError, KeyError)):
        await test_an_encode_that_the_consumer_has_asked_for_goes_on_while_another_request_waits_for_the_item()


async def in_flight(router: Router, role: str, least: int | None = None) -> Any:
    """Returns how many requests the instances of a role have, or whether there are so many."""
    workers = (await router.get("/workers")).json()["workers"]
    found = sum(one["in_flight"] for one in workers if one["role"] == role)
    return found if least is None else found >= least
