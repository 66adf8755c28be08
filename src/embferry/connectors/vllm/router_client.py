"""Calls from a consumer to the router: to ask for another producer, and to say why an embedding failed.

The calls run on threads of their own, so neither vLLM's scheduler nor a driver thread waits for the router. The address
comes from this engine's configuration; the client follows no redirect and uses no proxy.
"""

from __future__ import annotations

import http.client
import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import msgspec

from embferry import EmbeddingTransferError, PeerGone, RemoteProtocolError, TransportError
from embferry.protocol.messages import words
from embferry.trust.digests import (
    CONTENT_DIGEST,
    MESSAGE_DIGEST,
    DamagedError,
    check_answer,
    content_digest,
    request_digest,
)
from embferry.trust.proved_call import GREETING_PATH, proved_call
from embferry.trust.requests import ROUTER, Prover
from embferry.trust.trust import Trust

from ..shared.counters import Counters
from .config import router_address
from .coordinates import KEY, Coordinates, coordinates_in

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 64 << 10
CONNECT_S = 0.5
"""Time-out for connecting, and for the response to a report."""
FAILOVER_THREADS, REPORT_THREADS = 16, 4
"""Reports have threads of their own, so that they do not wait while other items are encoded."""
REPORT_S = 0.5
"""How long a request that fails waits until the router has its error."""


class RouterClient:
    """A client of one router. Every method returns at once."""

    def __init__(self, url: str, timeout_s: float, trust: Trust | None = None) -> None:
        """``timeout_s`` bounds how long an item may take to encode. ``trust``: None for what the environment says."""
        self.url = url.rstrip("/")
        self._host, self._port = router_address(url)
        self._timeout_s = timeout_s
        trust = Trust.or_environment(trust)
        trust.check_url(url, "the router's URL")
        self._tls = trust.tls if url.startswith("https:") else None
        keys = trust.keys
        self._prover = None if keys is None else Prover(keys.current, ROUTER)
        self.max_wait_s = timeout_s + 2 * CONNECT_S  # for a failover, provided that a thread is free
        self._failovers = ThreadPoolExecutor(FAILOVER_THREADS, "embferry-failover")
        self._reports = ThreadPoolExecutor(REPORT_THREADS, "embferry-failure")

    def failover(self, coordinates: Coordinates, lost: EmbeddingTransferError) -> Future[Coordinates]:
        """Asks for another producer of an embedding in the same room, or for the first one if none is named.

        The future raises PeerGone (there is no other producer), TransportError (no response in time) or
        RemoteProtocolError (an invalid response).
        """
        try:
            return self._failovers.submit(self._failover, coordinates, lost)
        except RuntimeError as error:  # no thread can be started, or this client is closed
            refused: Future[Coordinates] = Future()
            refused.set_exception(TransportError(f"the router at {self.url} cannot be asked: {error}"))
            return refused

    def report_failure(self, token: str, error: EmbeddingTransferError) -> Future[None]:
        """Reports why the embedding with this failover token cannot be obtained.

        The future raises nothing; problems are logged.
        """
        try:
            return self._reports.submit(self._report_failure, token, error)
        except RuntimeError as problem:
            log.warning("cannot report to the router why an embedding failed: %s", problem)
            done: Future[None] = Future()
            done.set_result(None)
            return done

    def close(self) -> None:
        """Drops the calls that have not begun. Those under way end by their time-outs."""
        for pool in (self._failovers, self._reports):
            pool.shutdown(wait=False, cancel_futures=True)

    def _failover(self, coordinates: Coordinates, lost: EmbeddingTransferError) -> Coordinates:
        code, message = words(lost)
        content = {"code": code, "message": message, "endpoint": coordinates.endpoint}
        path = f"/ec/failovers/{quote(coordinates.failover_token or '', safe='')}"
        status, body = self._post(path, content, self._timeout_s)
        if status != 200:
            raise PeerGone(f"the router has no other producer: status {status}: {_message(body)}")
        try:
            other = coordinates_in(msgspec.json.decode(body))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"the router's response cannot be read: {error}") from error
        if other is None:
            raise RemoteProtocolError(f"the router's response has no {KEY!r}")
        return other

    def _report_failure(self, token: str, error: EmbeddingTransferError) -> None:
        code, message = words(error)
        content = {"code": code, "message": message, "retryable": error.retryable}
        try:
            status, body = self._post(f"/ec/failures/{quote(token, safe='')}", content, CONNECT_S)
        except EmbeddingTransferError as problem:
            log.warning("cannot report to the router why an embedding failed: %s", problem)
        else:
            if status != 204:
                log.warning("the router refused the report of a failure with status %d: %s", status, _message(body))

    def _post(self, path: str, content: object, timeout_s: float) -> tuple[int, bytes]:
        """Sends a request, once more if it or its answer arrives damaged: the router takes each of them twice."""
        payload = msgspec.json.encode(content)
        for _ in range(2):
            try:
                return self._post_once(path, payload, timeout_s)
            except DamagedError as error:
                log.warning("a message between this engine and the router at %s arrived damaged: %s", self.url, error)
                damage = error
        raise TransportError(f"messages between this engine and the router at {self.url} arrive damaged: {damage}")

    def _post_once(self, path: str, payload: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Raises DamagedError if the request or its answer has changed on its way."""
        content = content_digest(payload)
        digest = request_digest("POST", path, str(len(payload)), content)
        headers = {"Content-Type": "application/json", CONTENT_DIGEST: content, MESSAGE_DIGEST: digest}
        call = proved_call(self._prover, "POST", path, content, f"the router at {self.url}")
        attempt = next(call)
        while True:
            proof = {} if attempt.authorization is None else {"Authorization": attempt.authorization}
            if attempt.is_greeting:
                status, received, body = self._send("GET", GREETING_PATH, None, proof, CONNECT_S)
            else:
                status, received, body = self._send("POST", path, payload, headers | proof, timeout_s)
            try:
                attempt = call.send((status, received.get))
            except StopIteration:
                break
        check_answer(digest, status, received, body)
        if status == 400 and _code(body) == "body_damaged":
            raise DamagedError(_message(body))
        return status, body

    def _connection(self) -> http.client.HTTPConnection:
        if self._tls is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        context = self._tls.dialling()
        return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_S, context=context)

    def _send(
        self, method: str, path: str, payload: bytes | None, headers: dict[str, str], timeout_s: float
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns status, header by names in lower case, and body of the answer."""
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(timeout_s)
            connection.request(method, path, payload, headers)
            with connection.getresponse() as response:
                status, body = response.status, response.read(MAX_ANSWER_BYTES + 1)
                received = {name.lower(): value for name, value in response.headers.items()}
        except OSError as error:
            raise TransportError(f"the router at {self.url} does not answer ({error or 'time-out'})") from error
        except (http.client.HTTPException, ValueError) as error:  # http.client raises ValueError for some responses
            raise RemoteProtocolError(f"the server at {self.url} is not a router: {error!r}") from error
        finally:
            connection.close()
        if len(body) > MAX_ANSWER_BYTES:
            raise RemoteProtocolError(f"the router's response is longer than {MAX_ANSWER_BYTES} bytes")
        return status, received, body


class FailedRequests:
    """Requests that cannot run. The router is told why before vLLM fails them: vLLM's response has no reason.

    The scheduler's thread calls the methods.
    """

    def __init__(self, router: RouterClient | None, counters: Counters) -> None:
        self._router, self._counters = router, counters
        # By request: the report and the time at which waiting for it ends, or None once vLLM has been told.
        self._reports: dict[str, tuple[Future[None] | None, float] | None] = {}

    def add(self, request: str, error: EmbeddingTransferError, token: str | None) -> None:
        """Fails a request. ``token`` is the failover token of the embedding that cannot be obtained."""
        if request in self._reports:
            return
        self._counters.add("requests_failed")
        report = self._router.report_failure(token, error) if self._router is not None and token is not None else None
        self._reports[request] = (report, time.monotonic() + REPORT_S)

    def __contains__(self, request: str) -> bool:
        return request in self._reports

    @property
    def are_reported(self) -> bool:
        """Whether vLLM has not been told of all requests that cannot run."""
        return any(entry is not None for entry in self._reports.values())

    def take(self) -> set[str]:
        """Returns the requests that vLLM is to fail now, each of them once."""
        now = time.monotonic()
        waiting = {request: entry for request, entry in self._reports.items() if entry is not None}
        due = {
            request for request, (report, until) in waiting.items() if report is None or report.done() or now >= until
        }
        self._reports.update(dict.fromkeys(due))
        return due

    def forget(self, request: str) -> None:
        """The request has finished."""
        self._reports.pop(request, None)


def _message(body: bytes) -> str:
    error = _error(body)
    return str(error["message"]) if "message" in error else repr(body[:200])


def _code(body: bytes) -> object:
    return _error(body).get("code")


def _error(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, dict[str, Any]])["error"]
    except (KeyError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}
