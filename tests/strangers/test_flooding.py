"""Strangers that open hundreds of connections and send hundreds of bad proofs."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack

import pytest

from embferry.trust.greeting import Channel
from tests.strangers.kernel import accepted_at
from tests.strangers.raw_http import request, send, status_of
from tests.strangers.running import Running
from tests.strangers.stranger import Stranger, say
from tests.trust.raw import hello

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

KINDS = ("control", "tcp", "http", "bootstrap", "encode", "language", "router")
MANY = 600
OF_AN_ADDRESS = {"control": 256, "tcp": 256, "http": 256, "bootstrap": 256}
"""Unfinished connections of one address; those of router and workers have time instead (docs/operations.md)."""

CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("kind", KINDS)
def test_silent_connections_are_bounded_and_questions_are_answered(
    running: Running, stranger: Stranger, kind: str
) -> None:
    port = running.ports[kind]
    with running.untouched(asking=True):
        with ExitStack() as held:
            for _ in range(MANY):
                held.enter_context(stranger.connected(port))
            running.ask()
            own = 8  # connections of the cluster itself
            assert len(accepted_at(port.pid, port.number)) <= OF_AN_ADDRESS.get(kind, MANY) + own
        running.ask()


@pytest.mark.parametrize("kind", KINDS[:6])
def test_bad_proofs_take_no_place(running: Running, stranger: Stranger, kind: str) -> None:
    port = running.ports[kind]
    with running.untouched(asking=True):
        for number in range(300):
            if kind in ("control", "tcp"):
                with stranger.connected(port) as sock, contextlib.suppress(OSError):
                    say(sock, hello(Channel[kind.upper()]) + bytes(500))
            else:
                answer = send(port.at, request("PUT", "/workers/x", Authorization=f"Embferry {number}"), shuts=False)
                assert status_of(answer) == 401
        running.ask()


def test_tiny_chunks_are_not_parsed_to_their_end(running: Running) -> None:
    """Anyone may send bodies to a router without API keys; workers refuse the heads (``test_writing.py``)."""
    chunks = b"1\r\na\r\n" * 100_000
    with running.untouched(asking=True):
        assert status_of(send(running.ports["router"].at, CHUNKED + chunks, shuts=False)) == 400
        running.ask()
