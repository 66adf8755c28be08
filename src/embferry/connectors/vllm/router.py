"""What a consumer says to the router: that a producer is lost and another is wanted, and why an embedding failed.

Asked in threads: neither vLLM's scheduler nor the thread that moves bytes waits for it. The address comes from this
engine's configuration; no redirect is followed and no proxy used.
"""

from __future__ import annotations

import http.client
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import quote

import msgspec

from embferry.protocol.errors import EmbeddingTransferError, PeerGone, RemoteProtocolError, TransportError

from .config import check_router
from .coordinates import KEY, Coordinates, coordinates_in

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 << 10
CONNECT_S = 0.5
"""For connecting, and for the answer to what is only told."""
ASKING_THREADS, TELLING_THREADS = 16, 4
"""Of their own each: what is told does not wait for what takes an encoder's time."""


class _Error(msgspec.Struct, frozen=True):
    message: str


class _Refusal(msgspec.Struct, frozen=True):
    error: _Error


class Router:
    """:param url: such as ``http://10.0.0.1:8000``.
    :param timeout_s: how long an embedding may take to be made again.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._host, self._port = check_router(url)
        self._timeout_s = timeout_s
        self.wait_s = timeout_s + 2 * CONNECT_S
        """For a replacement, at most, if a thread is free."""
        self._asking = ThreadPoolExecutor(ASKING_THREADS, "embferry-replacement")
        self._telling = ThreadPoolExecutor(TELLING_THREADS, "embferry-failure")

    def replacement(self, where: Coordinates, lost: EmbeddingTransferError) -> Future[Coordinates]:
        """Another producer of what was to come from ``where``, for the same room; the first one, if it has no endpoint.

        The future raises :class:`PeerGone` (there is none), :class:`TransportError` (no answer in time) or
        :class:`RemoteProtocolError` (an answer that cannot be)."""
        return self._asking.submit(self._replacement, where, lost)

    def failed(self, token: str, error: EmbeddingTransferError) -> Future[None]:
        """Tells why the embedding behind ``token`` cannot be had. The future raises nothing: it is logged."""
        return self._telling.submit(self._failed, token, error)

    def close(self) -> None:
        """Forgets what has not been asked yet; what is being asked ends by its time-outs."""
        for pool in (self._asking, self._telling):
            pool.shutdown(wait=False, cancel_futures=True)

    def _replacement(self, where: Coordinates, lost: EmbeddingTransferError) -> Coordinates:
        asked = {"code": lost.code, "message": lost.detail, "endpoint": where.endpoint}
        status, body = self._post(f"/ec/replacements/{_quoted(where)}", asked, self._timeout_s)
        if status != 200:
            raise PeerGone(f"the router has no other producer: it answered {status}: {_message(body)}")
        try:
            other = coordinates_in(msgspec.json.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"the router's answer cannot be read: {error}") from error
        if other is None:
            raise RemoteProtocolError(f"the router's answer has no {KEY!r}")
        return other

    def _failed(self, token: str, error: EmbeddingTransferError) -> None:
        said = {"code": error.code, "message": error.detail, "retryable": error.retryable}
        try:
            status, body = self._post(f"/ec/failures/{quote(token, safe='')}", said, CONNECT_S)
        except EmbeddingTransferError as problem:
            log.warning("the router does not know why an embedding failed: %s", problem)
        else:
            if status != 204:
                log.warning("the router answered %d to a failure: %s", status, _message(body))

    def _post(self, path: str, content: object, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            payload = msgspec.json.encode(content)
            connection.request("POST", path, payload, {"Content-Type": "application/json"})
            with connection.getresponse() as response:
                status, body = response.status, response.read(MAX_ANSWER_BYTES + 1)
        except OSError as error:
            raise TransportError(f"the router at {self.url} does not answer ({error or 'time-out'})") from error
        except http.client.HTTPException as error:
            raise RemoteProtocolError(f"what answers at {self.url} is no router: {error!r}") from error
        finally:
            connection.close()
        if len(body) > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"the router's answer is longer than {MAX_ANSWER_BYTES} bytes")
        return status, body


def _quoted(where: Coordinates) -> str:
    return quote(where.replacement or "", safe="")


def _message(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_Refusal).error.message
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return repr(body[:200])
