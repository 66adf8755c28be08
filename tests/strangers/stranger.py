"""A stranger: it knows every port and the whole protocol, but not the key."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import httpx

from embferry.protocol.messages import Body, Frame, encode
from embferry.transfer.control.framing import frame
from embferry.transfer.control.handshake import Handshake
from embferry.trust import ClusterKeys, Key, Trust
from embferry.trust.greeting import HELLO, REFUSED, Channel, Role
from tests.serve.workers.test_processes import START
from tests.strangers.raw_http import SECONDS
from tests.strangers.running import Port, Running
from tests.trust.raw import hello, read_hello

FOREIGN = Trust(ClusterKeys(Key.new()))
INVENTED = (None, "Bearer x", "Embferry", 'Embferry nonce="x", counter="1", proof="x"')
"""Values of ``Authorization`` that prove nothing."""


class Stranger:
    """Attacks the ports of a cluster."""

    def __init__(self, running: Running) -> None:
        self.running = running

    def request(self, kind: str, method: str, path: str, body: bytes = b"") -> None:
        """Makes a request with every proof that can be invented, and checks that each is refused."""
        for authorization in INVENTED:
            headers = {} if authorization is None else {"Authorization": authorization}
            url = self.running.url(kind) + path
            answer = httpx.request(method, url, content=body, headers=headers, timeout=START, trust_env=False)
            assert answer.status_code == 401, (method, path, answer.text)
            assert "embferry-proof" not in {name.lower() for name in answer.headers}
            if kind != "http":
                assert answer.json()["error"]["code"] == "proof_required"

    def send_frames(self, *bodies: Body, target: int = 0) -> None:
        """Sends control messages to the encode worker. Checks that nothing comes back but a hello and a refusal."""
        data = b"".join(frame(encode(Frame(1, 77, target, body))) for body in bodies)
        self.send_after_greeting("control", frame(Handshake().first()) + data)

    def send_after_greeting(self, kind: str, data: bytes) -> None:
        """Greets a port without a key, then with another one, and goes on as if it had been let in."""
        port, channel = self.running.ports[kind], Channel[kind.upper()]
        with self.connected(port) as sock:
            say(sock, hello(channel) + data)
            assert len(rest(sock)) <= HELLO.size + len(REFUSED)
        with self.connected(port) as sock:
            end = FOREIGN.greeting(Role.DIALER, channel)
            say(sock, end.hello)
            say(sock, end.receive(read_hello(sock)) + data)
            assert rest(sock) in (REFUSED, b"")

    @contextlib.contextmanager
    def connected(self, port: Port, source: str = "127.0.0.1") -> Iterator[socket.socket]:
        with socket.create_connection(port.at, SECONDS, source_address=(source, 0)) as sock:
            yield sock


def say(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # it has hung up already
        sock.sendall(data)


def rest(sock: socket.socket) -> bytes:
    """Returns everything that the other end still sends; returns when it hangs up."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            received += part
    return received
