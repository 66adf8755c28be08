"""A transport dies in the middle of an embedding, between two processes: the transfer goes on over the next one, at the
token where it stood."""

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

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
BLOCK_SIZE = 16
NUM_BLOCKS = TOKENS // 8 // BLOCK_SIZE


class Detour:
    """A transport whose handle leads through ``proxy``, as if a load balancer stood before it."""

    handle: type[Any]
    proxy: ChaosProxy

    def register(self, region: Region) -> bytes:
        handle = msgspec.msgpack.decode(super().register(region), type=self.handle)
        self.proxy.upstream = handle.port
        return msgspec.msgpack.encode(msgspec.structs.replace(handle, port=self.proxy.port))


class TcpDetour(Detour, TcpTransport):
    handle = TcpHandle


class MooncakeDetour(Detour, MooncakeTransport):
    """Of its side channel: the engine's own connections are not ours."""

    handle = MooncakeHandle


class NixlDetour(Detour, NixlTransport):
    """Likewise."""

    handle = NixlHandle


@contextmanager
def encode_side(room: int, *transports: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.transports.encode_side", str(room), *transports]
    environment = {**os.environ, "UCX_LOG_FILE": "stderr"}  # standard output is ours
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()


def change(proxy: ChaosProxy, first: Detour, second: Transport) -> None:
    """Transfers the embedding over ``first``, whose proxy dies on the way, and ``second``."""
    room = secrets.randbits(60)
    assert isinstance(first, Transport)
    first.proxy = proxy
    receiving = ReceiveManager(Geometry(LAYOUT, NUM_BLOCKS, BLOCK_SIZE), [first, second], settings=SETTINGS)
    with encode_side(room, first.name, second.name) as encode:
        assert encode.stdout is not None
        receiver = receiving.open(room, encode.stdout.readline().strip())
        stood: dict[str, int] = {}  # at which token the first chunk over each transport arrived
        receiver.on_change(lambda: stood.setdefault(receiver.machine.transport, receiver.machine.transferred_tokens))
        receiver.init()
        wait(receiver, SECONDS)
        said = json.loads(encode.stdout.readline())
        assert encode.wait(SECONDS) == 0

    arrived, sent = receiver.arrays(), content()
    assert digest(arrived) == digest(sent) == receiver.machine.content_digest
    for name, rows in sent.items():
        assert np.array_equal(arrived[name], rows), name

    assert (proxy.cuts, said["given_up"], receiver.machine.transport) == (1, [first.name], second.name)
    assert list(stood)[-1] == second.name
    assert 0 < stood[second.name] < TOKENS, "the first transport was to die in the middle"
    assert receiver.transfers > 8
    # What had arrived was not sent again: only what was under way when the transport failed, and failed again.
    under_way = SETTINGS.transport_failures * SETTINGS.writes_in_flight * CHUNK_TOKENS
    assert TOKENS * LAYOUT.token_bytes <= said["sent_bytes"] <= (TOKENS + under_way) * LAYOUT.token_bytes
    receiver.clear()
    receiving.allocator.check_integrity()
    receiving.close()


def test_tcp_dies_and_http_goes_on() -> None:
    with ChaosProxy(cut_after=24_000_000, toward="upstream", dies=True) as proxy:
        change(proxy, TcpDetour(), HttpTransport())
        assert sum(proxy.to_upstream) == 24_000_000


@pytest.mark.engines
@pytest.mark.parametrize("first", [MooncakeDetour, NixlDetour])
def test_an_engine_s_side_channel_dies_and_tcp_goes_on(first: type[Detour]) -> None:
    with ChaosProxy(cut_after=2_000, toward="upstream", dies=True) as proxy:
        change(proxy, first(), TcpTransport())
