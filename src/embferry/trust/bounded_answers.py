"""A client of other parts with httpx, whose answers are not encoded, and bounded in size.

httpx unpacks what an answer's ``Content-Encoding`` names, and reads a whole answer, before its caller can check a proof
or a digest. So a few kilobytes of a liar would become gigabytes. Imported only where httpx is installed.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx

from .digests import LINES

MAX_ANSWER_BYTES = 16 << 20
"""Longest answer, unless the request says otherwise: a list of workers, what was encoded, an error."""
MAX_COMPLETION_BYTES = 64 << 20
"""Longest answer of a language worker, and longest whole one of an instance of vLLM."""
ANSWER_LIMIT = "embferry_answer_limit"
"""Key of a request's extensions: the longest answer to it, in bytes."""
STREAMED = "embferry_streamed"
"""Key of a request's extensions: its caller passes on a stream as it arrives, so a stream has any length."""
_NO_HTTP = "illegal request line"
"""h11's words for an answer that begins with a control character, as TLS does."""
_STREAMS = (LINES, "text/event-stream")


class BoundedAnswers(httpx.AsyncBaseTransport):
    """Asks for answers without encoding, and refuses others and longer ones with an ``httpx.ReadError``.

    Args:
        transport: Sends the requests.
        max_bytes: Longest answer to a request that does not say otherwise.
    """

    def __init__(self, transport: httpx.AsyncBaseTransport, max_bytes: int = MAX_ANSWER_BYTES) -> None:
        self._transport, self._max_bytes = transport, max_bytes

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.headers["Accept-Encoding"] = "identity"
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.RemoteProtocolError as error:
            if request.url.scheme == "http" and _NO_HTTP in str(error):
                why = "the server does not answer in HTTP; if it speaks TLS, write https:// in its URL"
                raise httpx.RemoteProtocolError(why, request=request) from error
            raise
        coding = response.headers.get("content-encoding", "identity")
        if coding != "identity":
            await response.aclose()
            why = f"its answer has Content-Encoding {coding[:40]!r}, which parts of a cluster do not send each other"
            raise httpx.ReadError(why, request=request)
        is_stream = response.status_code == 200 and response.headers.get("content-type", "").startswith(_STREAMS)
        if not (is_stream and request.extensions.get(STREAMED)):
            assert isinstance(response.stream, httpx.AsyncByteStream)
            limit: int = request.extensions.get(ANSWER_LIMIT, self._max_bytes)
            response.stream = _Bounded(response.stream, limit, request)
        return response

    async def aclose(self) -> None:
        await self._transport.aclose()


class _Bounded(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream, limit: int, request: httpx.Request) -> None:
        self._stream, self._limit, self._request = stream, limit, request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        received = 0
        async for piece in self._stream:
            received += len(piece)
            if received > self._limit:
                raise httpx.ReadError(f"its answer has more than {self._limit:,} bytes", request=self._request)
            yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


def bounded_client(
    *,
    limits: httpx.Limits,
    timeout: httpx.Timeout | float = 5.0,
    verify: ssl.SSLContext | bool = True,
    transport: httpx.AsyncBaseTransport | None = None,
    max_bytes: int = MAX_ANSWER_BYTES,
) -> httpx.AsyncClient:
    """Returns a client for other parts. It uses no proxy and no credentials of the environment.

    Args:
        limits: On its connections.
        timeout: Of its requests, unless they have their own.
        verify: The context for TLS.
        transport: Replaces the network in tests.
        max_bytes: Longest answer to a request that does not say otherwise.
    """
    network = transport or httpx.AsyncHTTPTransport(verify=verify, limits=limits, trust_env=False)
    answers = BoundedAnswers(network, max_bytes)
    return httpx.AsyncClient(trust_env=False, timeout=timeout, transport=answers, cookies=no_cookies())


def no_cookies() -> CookieJar:
    """Returns a jar that takes no cookies. httpx keeps any number of them, and returns them on later requests."""
    return CookieJar(DefaultCookiePolicy(allowed_domains=()))
