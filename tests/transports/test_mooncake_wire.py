"""What the ``mooncake`` transport makes of handles that lie, and of peers that break the side channel's format."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from embferry.protocol.errors import TransportError
from embferry.testing.pair import TransportPair
from embferry.transports.leased.mooncake import MooncakeTransport
from embferry.transports.leased.mooncake.channel import Enter, Hello, Leave
from embferry.transports.leased.mooncake.transport import MooncakeHandle

pytestmark = [pytest.mark.integration, pytest.mark.engines]


@pytest.fixture
def pair() -> Iterator[TransportPair]:
    pair = TransportPair(MooncakeTransport)
    yield pair
    pair.close()


LIES: list[tuple[dict[str, Any], str]] = [
    ({"protocol": "rdma"}, "configure the same"),
    ({"metadata_server": "http://10.0.0.1/metadata"}, "configure the same"),
    ({"host": "example.org"}, "not an IP address"),
    ({"host": "0.0.0.0"}, "nobody can be reached"),
    ({"rows": ((0, 0),)}, "empty"),
    ({"rows": ((0, 48), (40, 1))}, "overlap"),
    ({"rows": ((0, 1 << 46),)}, "larger than any memory"),
    ({"num_blocks": 0}, "not a handle"),
    ({"segment": ""}, "not a handle"),
    ({"token": b"short"}, "not a handle"),
]


@pytest.mark.parametrize(("lie", "match"), LIES)
def test_a_handle_that_lies_is_refused(pair: TransportPair, lie: dict[str, Any], match: str) -> None:
    honest = msgspec.msgpack.decode(pair.handle, type=MooncakeHandle)
    with pytest.raises(TransportError, match=match) as caught:
        pair.sender.transport.connect(msgspec.msgpack.encode(msgspec.structs.replace(honest, **lie)))
    assert not caught.value.retryable


def frame(message: Any) -> bytes:
    if isinstance(message, bytearray):
        return bytes(message)  # as it is
    body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return struct.pack("<I", len(body)) + body


BLOCK_3 = struct.pack("<I", 3)
HOSTILE: list[list[Any]] = [
    [Hello(b"0" * 16)],
    [Enter(1, 1, BLOCK_3)],
    ["hello", b"\xc1"],
    ["hello", b""],
    ["hello", msgspec.msgpack.encode([2, 1, 1])],
    ["hello", Leave(1, True)],
    ["hello", Enter(1, 1, BLOCK_3), Enter(1, 1, BLOCK_3)],
    ["hello", Enter(1, 1, BLOCK_3[:3])],
    ["hello", Enter(1, 1, struct.pack("<I", 16))],
    ["hello", Enter(1, 1, BLOCK_3 * 100)],
    ["hello", bytearray(struct.pack("<I", 0xFFFFFFFF))],
]


@pytest.mark.parametrize("messages", HOSTILE)
def test_a_sender_that_breaks_the_format_loses_its_connection_and_nobody_else_does(
    pair: TransportPair, messages: list[Any]
) -> None:
    pair.admit(1, (3,))
    handle = msgspec.msgpack.decode(pair.handle, type=MooncakeHandle)
    with socket.create_connection((handle.host, handle.port), timeout=10) as sock:
        for message in messages:
            sock.sendall(frame(Hello(handle.token) if message == "hello" else message))
        with contextlib.suppress(ConnectionResetError):  # it need not have read all
            while sock.recv(4096):
                pass
    pieces = pair.fill((3,))
    assert pair.write(1, (3,), pieces) is None
    pair.expect(pieces)


def test_a_receiver_that_breaks_the_format_is_a_lost_link(pair: TransportPair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        honest = msgspec.msgpack.decode(pair.handle, type=MooncakeHandle)
        handle = msgspec.msgpack.encode(msgspec.structs.replace(honest, port=listener.getsockname()[1]))
        pair.sender.transport.connect(handle)
        connection, _ = listener.accept()
        with connection:
            pair.sender.transport.write(handle, 1, (3,), pair.fill((3,)), 5)
            connection.sendall(frame(msgspec.msgpack.encode([5, 1, True])))  # Left, before anything was let in
            error = pair.sender.written(5)
            assert error is not None
            assert error.retryable
            assert pair.sender.lost().handle == handle
