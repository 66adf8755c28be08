"""A sender, or a receiver, that says what a test wants it to say on the side channel of ``nixl`` and ``mooncake``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from embferry.testing.pair import TransportPair
from embferry.transports.handles import boot_id
from embferry.transports.leased import messages as m
from embferry.transports.leased.mooncake.transport import MooncakeHandle
from embferry.transports.leased.nixl.transport import NixlHandle
from embferry.transports.leased.transport import LeasedTransport
from embferry.transports.windows import as_ranges
from tests.trust import raw

TIMEOUT_S = 60.0


def decoded(pair: TransportPair) -> Any:
    """The handle of the pair's receiver."""
    kind = {"nixl": NixlHandle, "mooncake": MooncakeHandle}[pair.receiver.transport.name]
    return msgspec.msgpack.decode(pair.handle, type=kind)


def receiving(pair: TransportPair) -> Any:
    """The receiving end of the pair's receiver."""
    transport = pair.receiver.transport
    assert isinstance(transport, LeasedTransport)
    assert transport._receiving is not None
    return transport._receiving


@contextmanager
def running(
    script: str, *arguments: str, stderr: int | None = None, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A script of this folder in a process of its own, which is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT_S)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def frame(message: m.Message | bytes, number: int = 0) -> bytes:
    """The frame of a message, the first on its connection unless ``number`` is given."""
    data = message if isinstance(message, bytes) else m.encode(message)
    return m.framed(data, number)


def frames(messages: Iterable[m.Message | bytes], first: int) -> bytes:
    return b"".join(frame(message, number) for number, message in enumerate(messages, first))


def receive(sock: socket.socket) -> m.Message | None:
    """The next message; None: the peer hung up."""
    data = b""
    wanted = m.HEADER.size
    while len(data) < wanted:
        try:
            part = sock.recv(wanted - len(data))
        except ConnectionResetError:  # it need not have read all
            return None
        if not part:
            return None
        data += part
        if len(data) == m.HEADER.size:
            wanted += m.HEADER.unpack(data)[0]
    return m.decode(data[m.HEADER.size :])


def connected(pair: TransportPair) -> socket.socket:
    handle = decoded(pair)
    sock = socket.create_connection((handle.host, handle.port))
    sock.settimeout(TIMEOUT_S)
    return raw.greet(sock, pair.receiver.transport.channel)  # type: ignore[attr-defined]


def greet(pair: TransportPair, sock: socket.socket) -> None:
    sock.sendall(frame(m.Hello(decoded(pair).token, boot_id())))
    assert isinstance(receive(sock), m.Welcome)


def ask(serial: int, epoch: int = 1, *ranges: tuple[int, int]) -> m.Ask:
    """For the first byte, unless ``ranges`` are given."""
    return m.Ask(serial, epoch, m.pack_ranges(as_ranges(ranges or [(0, 1)])))


@contextmanager
def holder(pair: TransportPair, serial: int, epoch: int) -> Iterator[socket.socket]:
    """A sender with a lease on the first byte."""
    with connected(pair) as sock:
        greet(pair, sock)
        sock.sendall(frame(ask(serial, epoch), 1))
        assert receive(sock) == m.Verdict(serial, True)
        yield sock
