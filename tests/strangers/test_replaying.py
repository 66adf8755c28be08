"""Strangers that have recorded what honest parts sent, and send it again."""

from __future__ import annotations

import pytest

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.leases import Worker
from embferry.transfer.control.framing import frame
from embferry.transfer.control.handshake import Handshake
from embferry.trust.greeting import PROOF_BYTES, REFUSED, Channel, Role
from tests.strangers.raw_http import Relay, send, status_of
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger, rest, say
from tests.trust.raw import read_hello

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

WORKER = Worker(id="replayed", role="encode", url="http://127.0.0.1:1", endpoint="tcp://127.0.0.1:2")


@pytest.mark.parametrize("kind", ["control", "tcp"])
def test_a_recorded_greeting_opens_nothing(running: Running, stranger: Stranger, kind: str) -> None:
    port, channel = running.ports[kind], Channel[kind.upper()]
    with running.untouched():
        with stranger.connected(port) as sock:
            end = running.trust.greeting(Role.DIALER, channel)
            say(sock, end.hello)
            proofs = end.receive(read_hello(sock))
            say(sock, proofs)
            while not end.done:
                end.receive(sock.recv(PROOF_BYTES))
        for _ in range(3):
            with stranger.connected(port) as sock:
                say(sock, end.hello + proofs + frame(Handshake().first()))
                read_hello(sock)
                assert rest(sock) in (REFUSED, b"")


def test_recorded_requests_are_refused_at_every_server(running: Running) -> None:
    """A worker is registered and removed through a relay; then its requests come again, at each server."""
    with running.untouched():
        with Relay(running.ports["bootstrap"].at) as relay:
            client = BootstrapClient(f"http://127.0.0.1:{relay.port}", trust=running.trust)
            client.register(WORKER)
            client.workers()
            client.remove(WORKER.id)
        proved = [one for one in relay.requests if b"authorization: embferry" in one.lower()]
        assert len(proved) >= 3
        for kind in ("bootstrap", "encode", "language", "http"):
            for recorded in proved:
                head, end, body = recorded.partition(b"\r\n\r\n")
                answer = send(running.ports[kind].at, head + b"\r\nConnection: close" + end + body, shuts=False)
                assert status_of(answer) in (401, 413), answer  # 413: the transport takes no body at all
