"""One request of a blocking HTTP client, on a connection of its own, within a time limit."""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from dataclasses import dataclass, field

import h11

from embferry.protocol.errors import TlsFailed
from embferry.trust.tls import begins_tls, fails_again, reason_of

MAX_ANSWER_BYTES = 16 << 20
MAX_ANSWER_HEAD_BYTES = 64 << 10
ATTEMPTS = 3  # of a request whose connection the server closes; every request here may be repeated


@dataclass(slots=True)
class Response:
    """A server's answer.

    Attributes:
        headers: By name in lower case; the last of several with the same name.
        body: Longer than :data:`MAX_ANSWER_BYTES` if the answer is; the rest is not read.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)


def exchange(
    host: str, port: int, request: h11.Request, payload: bytes, deadline: float, context: ssl.SSLContext | None = None
) -> Response:
    """Sends a request and returns its answer.

    Asks again if the server closes the connection, for example to make room for another.

    Args:
        host: A name or an IP address, without brackets.
        port: The TCP port.
        request: The head.
        payload: The body.
        deadline: When the last byte of the answer must be there, by the monotonic clock.
        context: For TLS. None: the connection is not encrypted.

    Raises:
        OSError: The server cannot be reached, or does not answer in time.
        h11.RemoteProtocolError: The answer is not HTTP.
        TlsFailed: The two ends cannot agree on TLS.
    """
    try:
        return _exchange(host, port, request, payload, deadline, context)
    except ssl.SSLError as error:
        if fails_again(error):
            raise TlsFailed(reason_of(error)) from error
        raise ConnectionError(f"the TLS connection broke: {reason_of(error)}") from error


def _exchange(
    host: str, port: int, request: h11.Request, payload: bytes, deadline: float, context: ssl.SSLContext | None
) -> Response:
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            response = _ask(host, port, request, payload, deadline, context)
            if response.status != 503 or b"too_many_connections" not in response.body:
                return response
    return _ask(host, port, request, payload, deadline, context)


def _ask(
    host: str, port: int, request: h11.Request, payload: bytes, deadline: float, context: ssl.SSLContext | None
) -> Response:
    answer = _Answer()
    with _secured(_connect(host, port, deadline), host, deadline, context) as sock:
        sock.settimeout(_left(deadline))
        sock.sendall((answer.http.send(request) or b"") + payload)
        while not answer.complete:
            sock.settimeout(_left(deadline))
            answer.receive(sock.recv(65536))
    return answer.response


class _Answer:
    """The answer to one request, as it arrives."""

    def __init__(self) -> None:
        self.http = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_ANSWER_HEAD_BYTES)
        self.response = Response()
        self.complete = False
        self._begun = False

    def receive(self, data: bytes) -> None:
        """Raises OSError if the server has closed the connection without an answer."""
        if not data and not self._begun:
            raise ConnectionResetError("it closed the connection without an answer")
        if not self._begun and begins_tls(data):
            raise TlsFailed("the server speaks TLS; write https:// in its URL, and give this end a certificate")
        self._begun = True
        self.http.receive_data(data)
        response = self.response
        while not self.complete and (event := self.http.next_event()) is not h11.NEED_DATA:
            if isinstance(event, h11.Response):
                response.status = event.status_code
                response.headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
            elif isinstance(event, h11.Data):
                response.body += event.data
            self.complete = isinstance(event, h11.EndOfMessage) or len(response.body) > MAX_ANSWER_BYTES


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it did not answer in time")
    return left


def _secured(sock: socket.socket, host: str, deadline: float, context: ssl.SSLContext | None) -> socket.socket:
    """Returns the socket after a handshake of TLS, if there is a context."""
    if context is None:
        return sock
    try:
        sock.settimeout(_left(deadline))
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """Returns a connection to the first address of ``host`` that accepts one."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for index, (_, _, _, _, address) in enumerate(found):
        try:
            return socket.create_connection((str(address[0]), port), timeout=_left(deadline) / (len(found) - index))
        except OSError:
            if index == len(found) - 1:
                raise
    raise OSError(f"{host} has no address")
