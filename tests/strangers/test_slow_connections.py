"""Strangers whose connections send a byte now and then, and never an end."""

from __future__ import annotations

import contextlib
import threading
from contextlib import ExitStack

import pytest

from embferry.trust.greeting import Channel
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger, say
from tests.trust.raw import hello

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

MANY = 300
"""More than most ports admit of one address."""
BEGINNINGS = {
    "control": hello(Channel.CONTROL)[:8],
    "tcp": hello(Channel.TCP)[:8],
    "http": b"GET /embferry/1/0 HTTP/1.1\r\nX: ",
    "bootstrap": b"PUT /workers/x HTTP/1.1\r\nX: ",
    "encode": b"POST /encode HTTP/1.1\r\nX: ",
    "language": b"POST /generate HTTP/1.1\r\nX: ",
    "router": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_they_keep_nobody_waiting(running: Running, stranger: Stranger, kind: str) -> None:
    over = threading.Event()
    with running.untouched(asking=True):
        with ExitStack() as held:
            socks = [held.enter_context(stranger.connected(running.ports[kind])) for _ in range(MANY)]

            def trickle() -> None:
                while not over.wait(0.1):
                    for sock in socks:
                        with contextlib.suppress(OSError):
                            sock.send(b"a")

            for sock in socks:
                say(sock, BEGINNINGS[kind])
            thread = threading.Thread(target=trickle)
            thread.start()
            try:
                for _ in range(3):
                    running.ask()
            finally:
                over.set()
                thread.join()
        running.ask()
