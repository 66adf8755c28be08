"""A transport fails during a transfer between two processes, and the transfer resumes over the next one."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from embferry import ReceiveManager, wait
from embferry.protocol.layout import Geometry
from embferry.testing.proxy import ChaosProxy
from embferry.transports.contract import Region, Transport
from embferry.transports.http import HttpTransport
from embferry.transports.leased.mooncake import MooncakeTransport
from embferry.transports.leased.mooncake.transport import MooncakeHandle
from embferry.transports.leased.nixl import NixlTransport
from embferry.transports.leased.nixl.transport import NixlHandle
from embferry.transports.tcp import TcpTransport
from embferry.transports.tcp.transport import TcpHandle
from tests.transports.encode_side import CHUNK_TOKENS, LAYOUT, SECONDS, SETTINGS, TOKENS, content, digest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
BLOCK_SIZE = 16
NUM_BLOCKS = TOKENS // 8 // BLOCK_SIZE


class ThroughProxy:
    """Mixin for transports whose handle leads to ``proxy``, as with a load balancer in front of the receiver."""

    handle: type[Any]
    proxy: ChaosProxy

    def register(self, region: Region) -> bytes:
        handle = msgspec.msgpack.decode(super().register(region), type=self.handle)
        self.proxy.upstream = handle.port
        return msgspec.msgpack.encode(msgspec.structs.replace(handle, port=self.proxy.port))


class TcpThroughProxy(ThroughProxy, TcpTransport):
    handle = TcpHandle


class MooncakeThroughProxy(ThroughProxy, MooncakeTransport):
    """Only the side channel goes through the proxy; the engine's own connections do not."""

    handle = MooncakeHandle


class NixlThroughProxy(ThroughProxy, NixlTransport):
    """Only the side channel goes through the proxy; the engine's own connections do not."""

    handle = NixlHandle


@contextmanager
def encode_side(room: int, *transports: str) -> Iterator[subprocess.Popen[str]]:
    """Starts the encode side in a process of its own, and ends it."""
    command = [sys.executable, "-m", "tests.transports.encode_side", str(room), *transports]
    environment = {**os.environ, "UCX_LOG_FILE": "stderr"}  # UCX logs to standard output, which carries the result
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def transfer_with_change(proxy: ChaosProxy, first: ThroughProxy, second: Transport) -> None:
    """Transfers the embedding over ``first``, whose proxy dies during the transfer, and then over ``second``."""
    room = secrets.randbits(60)
    assert isinstance(first, Transport)
    first.proxy = proxy
    receiving = ReceiveManager(Geometry(LAYOUT, NUM_BLOCKS, BLOCK_SIZE), [first, second], settings=SETTINGS)
    with encode_side(room, first.name, second.name) as encode:
        assert encode.stdout is not None
        receiver = receiving.open(room, encode.stdout.readline().strip())
        begun_at: dict[str, int] = {}  # transport: transferred tokens when it was first used

        def changed() -> None:  # on the driver thread, at each change: a callback may come later
            begun_at.setdefault(receiver.machine.transport, receiver.machine.transferred_tokens)

        receiver.wake_on_change(changed)
        receiver.init()
        wait(receiver, SECONDS)
        report = json.loads(encode.stdout.readline())
        assert encode.wait(SECONDS) == 0

    arrived, sent = receiver.arrays(), content()
    assert digest(arrived) == digest(sent) == receiver.machine.content_digest
    for name, rows in sent.items():
        assert np.array_equal(arrived[name], rows), name

    assert (proxy.cuts, report["given_up"], receiver.machine.transport) == (1, [first.name], second.name)
    assert list(begun_at)[-1] == second.name
    assert 0 < begun_at[second.name] < TOKENS, "the first transport must fail in the middle of the transfer"
    assert receiver.transfers > 8
    # Only the chunks in flight at each failure of the transport are sent again.
    in_flight = SETTINGS.transport_failures * SETTINGS.writes_in_flight * CHUNK_TOKENS
    assert TOKENS * LAYOUT.token_bytes <= report["sent_bytes"] <= (TOKENS + in_flight) * LAYOUT.token_bytes
    receiver.clear()
    receiving.allocator.check_integrity()
    receiving.close()


def test_a_transfer_resumes_over_http_when_tcp_fails() -> None:
    with ChaosProxy(cut_after=24_000_000, toward="upstream", dies=True) as proxy:
        transfer_with_change(proxy, TcpThroughProxy(), HttpTransport())
        assert sum(proxy.to_upstream) == 24_000_000


@pytest.mark.engines
@pytest.mark.parametrize("first", [MooncakeThroughProxy, NixlThroughProxy])
def test_a_transfer_resumes_over_tcp_when_an_engine_s_side_channel_fails(first: type[ThroughProxy]) -> None:
    with ChaosProxy(cut_after=2_000, toward="upstream", dies=True) as proxy:
        transfer_with_change(proxy, first(), TcpTransport())
