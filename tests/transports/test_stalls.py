"""Links that swallow everything, and links that are only slow: whole transfers through a relay, over real sockets."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from embferry import Fields, ReceiveManager, SendManager, wait
from embferry.memory.buffers import source_pieces
from embferry.protocol.errors import TransportError, TransportStalled
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.settings import TransferSettings
from embferry.testing.pair import SMALL, Endpoint, embedding, eventually
from embferry.testing.proxy import ChaosProxy
from embferry.transports.contract import Region, Transport
from embferry.transports.http import HttpTransport
from embferry.transports.leased.mooncake import MooncakeTransport
from embferry.transports.leased.mooncake.transport import MooncakeHandle
from embferry.transports.leased.nixl import NixlTransport
from embferry.transports.leased.nixl.transport import NixlHandle
from embferry.transports.shm import ShmTransport
from embferry.transports.tcp import TcpTransport
from embferry.transports.tcp.transport import TcpHandle

pytestmark = pytest.mark.integration

SECONDS = 100.0
LAYOUT = Layout((Field("input_embeddings", "bfloat16", 2048), Field("fill_ids", "int32", 1)))
BLOCK_SIZE = 16


def behind(proxy: ChaosProxy, transport: Any, kind: type[Any]) -> Transport:
    """Makes the handle of a transport lead to ``proxy``, as with a load balancer in front of the receiver."""
    register = transport.register

    def registered(region: Region) -> bytes:
        handle = msgspec.msgpack.decode(register(region), type=kind)
        proxy.upstream = handle.port
        return msgspec.msgpack.encode(msgspec.structs.replace(handle, port=proxy.port))

    transport.register = registered
    found: Transport = transport
    return found


def tcp_pair(proxy: ChaosProxy, stall_timeout_s: float) -> tuple[Transport, Transport]:
    """Returns the transports of a sender and of a receiver whose connections go through ``proxy``."""
    sending, receiving = (TcpTransport(stall_timeout_s=stall_timeout_s) for _ in range(2))
    return sending, behind(proxy, receiving, TcpHandle)


def nixl_pair(proxy: ChaosProxy, stall_timeout_s: float) -> tuple[Transport, Transport]:
    """Only the side channel goes through the proxy; the engine's own connections do not."""
    sending, receiving = (NixlTransport(stall_timeout_s=stall_timeout_s, connect_timeout_s=3.0) for _ in range(2))
    return sending, behind(proxy, receiving, NixlHandle)


def mooncake_pair(proxy: ChaosProxy, stall_timeout_s: float) -> tuple[Transport, Transport]:
    sending, receiving = (MooncakeTransport(stall_timeout_s=stall_timeout_s, connect_timeout_s=3.0) for _ in range(2))
    return sending, behind(proxy, receiving, MooncakeHandle)


def http_pair(proxy: ChaosProxy, stall_timeout_s: float) -> tuple[Transport, Transport]:
    sending = HttpTransport(stall_timeout_s=stall_timeout_s, advertise=f"http://127.0.0.1:{proxy.port}")
    assert sending.address
    assert sending._server is not None
    proxy.upstream = sending._server.listener.port
    return sending, HttpTransport(stall_timeout_s=stall_timeout_s, connections=1)


PAIRS = {"tcp": tcp_pair, "http": http_pair, "nixl": nixl_pair, "mooncake": mooncake_pair}
OTHER: dict[str, Any] = {"tcp": HttpTransport, "http": TcpTransport, "nixl": TcpTransport, "mooncake": TcpTransport}


@dataclass
class Outcome:
    """A finished transfer, whose bytes were compared.

    Attributes:
        transport: The one in use at the end.
        sent_tokens: Tokens written, also in vain.
    """

    transport: str
    sent_tokens: float


def transfer(
    sending: list[Transport], receiving: list[Transport], tokens: int, chunk_tokens: int, **settings: Any
) -> Outcome:
    """Transfers an embedding, and checks that it arrives with equal bytes."""
    own = TransferSettings(chunk_bytes=chunk_tokens * LAYOUT.token_bytes, **settings)
    geometry = Geometry(LAYOUT, -(-tokens // BLOCK_SIZE), BLOCK_SIZE)
    with managers(geometry, sending, receiving, own) as (sender_side, receiver_side):
        rows, room = embedding(LAYOUT, tokens), secrets.randbits(60)
        sender = sender_side.open(room)
        sender.init(tokens, b"digest")
        sender.send_embedding(rows)
        receiver = receiver_side.open(room, sender_side.endpoint)
        receiver.init()
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), rows)
        outcome = Outcome(receiver.machine.transport, sender.sent_bytes / LAYOUT.token_bytes)
        receiver.clear()
        receiver_side.allocator.check_integrity()
    return outcome


@contextmanager
def managers(
    geometry: Geometry, sending: list[Transport], receiving: list[Transport], settings: TransferSettings
) -> Iterator[tuple[SendManager, ReceiveManager]]:
    with ExitStack() as stack:
        sender_side = SendManager(LAYOUT, sending, settings=settings)
        stack.callback(sender_side.close)
        receiver_side = ReceiveManager(geometry, receiving, settings=settings)
        stack.callback(receiver_side.close)
        yield sender_side, receiver_side


def same(a: Fields, b: Fields) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize("swallow_after", [0, 3_000_000])
@pytest.mark.parametrize("toward", ["clients", "upstream"])
@pytest.mark.parametrize("first", ["tcp", "http"])
def test_a_transfer_resumes_over_the_next_transport_when_a_link_swallows_everything(
    first: str, toward: Literal["clients", "upstream"], swallow_after: int
) -> None:
    """Payload, verdicts, requests or responses are lost from a byte on, or from the start. No connection breaks."""
    carries_payload = toward == ("upstream" if first == "tcp" else "clients")
    if not carries_payload:
        swallow_after = min(swallow_after, 400)  # verdicts and requests are small
    tokens, chunk_tokens = 2000, 100
    with ChaosProxy(swallow_after=swallow_after, toward=toward) as proxy:
        sending, receiving = PAIRS[first](proxy, 0.5)
        second = OTHER[first]
        told = recorded(sending)
        outcome = transfer([sending, second()], [receiving, second()], tokens, chunk_tokens)
        assert proxy.swallowed > 0
    assert outcome.transport == second.name
    # On a busy machine the receiver may close the connection twice before the sender's time for a greeting is over.
    stalled = told.index("stall") if "stall" in told else len(told)
    assert "write" not in told[stalled:], "one stall gives the transport up"


def recorded(transport: Transport) -> list[str]:
    """Returns a list that grows with each write that is started over ``transport`` and with each one that stalls."""
    told: list[str] = []
    write, poll = transport.write, transport.poll

    def recorded_write(*arguments: Any) -> None:
        told.append("write")
        write(*arguments)

    def recorded_poll() -> list[Any]:
        events = poll()
        told.extend("stall" for event in events if isinstance(getattr(event, "error", None), TransportStalled))
        return events

    transport.write, transport.poll = recorded_write, recorded_poll  # type: ignore[method-assign]
    return told


@pytest.mark.engines
@pytest.mark.parametrize(("toward", "swallow_after"), [("clients", 5_000), ("upstream", 1_000), ("clients", 0)])
@pytest.mark.parametrize("first", ["nixl", "mooncake"])
def test_a_transfer_resumes_over_tcp_when_the_side_channel_of_an_engine_swallows_everything(
    first: str, toward: Literal["clients", "upstream"], swallow_after: int
) -> None:
    tokens = 20_000
    if first == "mooncake":
        swallow_after //= 4  # it tells the sender less
    with ChaosProxy(swallow_after=swallow_after, toward=toward) as proxy:
        sending, receiving = PAIRS[first](proxy, 0.5)
        outcome = transfer([sending, TcpTransport()], [receiving, TcpTransport()], tokens, 100)
        assert proxy.swallowed > 0
    assert outcome.transport == "tcp"


@pytest.mark.parametrize("first", ["tcp", "http"])
def test_a_link_on_which_a_chunk_takes_longer_than_every_time_out_is_slow_and_not_dead(first: str) -> None:
    tokens = (
        600  # 2.4 MB; the first chunk takes 6 s, and the time-outs of 4 s are long for a process that waits for a core
    )
    with ChaosProxy(bytes_per_s=350_000) as proxy:
        sending, receiving = PAIRS[first](proxy, 4.0)
        outcome = transfer([sending], [receiving], tokens, 500, transfer_timeout=4.0)
    assert (outcome.transport, outcome.sent_tokens) == (first, tokens)


@pytest.mark.parametrize("first", ["tcp", "http"])
def test_a_round_trip_of_300_ms_is_no_stall(first: str) -> None:
    tokens = 400
    with ChaosProxy(delay_s=0.15) as proxy:
        sending, receiving = PAIRS[first](proxy, 1.5)
        outcome = transfer([sending], [receiving], tokens, 50)
    assert (outcome.transport, outcome.sent_tokens) == (first, tokens)


@pytest.mark.parametrize("kind", [TcpTransport, HttpTransport, ShmTransport])
def test_a_stopped_receiver_ends_writes_or_does_not_matter_and_serves_again_when_it_continues(kind: Any) -> None:
    sender = Endpoint(lambda wake: kind(wake, stall_timeout_s=0.3))
    pieces = source_pieces(SMALL, embedding(SMALL.layout, 10), 0, 10, (0, 1), 0)
    tickets = iter(range(1, 1000))
    with receiver_process(kind.name, sender.transport.address) as (process, handle):

        def write() -> TransportError | None:
            ticket = next(tickets)
            sender.transport.connect(handle)
            sender.transport.write(handle, 1, (0, 1), pieces, ticket)
            return sender.written(ticket)

        eventually(lambda: write() is None)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        error = write()
        if kind is ShmTransport:
            assert error is None, "the sender copies by itself"
        else:
            assert isinstance(error, TransportStalled)
        process.send_signal(signal.SIGCONT)
        eventually(lambda: write() is None)
    sender.transport.close()


@contextmanager
def receiver_process(name: str, address: bytes) -> Iterator[tuple[subprocess.Popen[str], bytes]]:
    script = str(Path(__file__).with_name("receiver.py"))
    command = [sys.executable, script, name, *([address.hex()] if address else [])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, bytes.fromhex(process.stdout.readline().strip())
    finally:
        process.kill()
        process.wait(SECONDS)
        process.stdout.close()
