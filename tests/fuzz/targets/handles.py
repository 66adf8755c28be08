"""Handles and addresses of every transport, as they arrive in ``open`` and ``offer``."""

from __future__ import annotations

from random import Random

import msgspec

from embferry.protocol.errors import TransportError
from embferry.transports.handles import decode_handle
from embferry.transports.http.messages import HttpAddress, HttpHandle, parse_address
from embferry.transports.leased.mooncake.transport import MooncakeHandle
from embferry.transports.leased.nixl.transport import NixlHandle
from embferry.transports.net import address
from embferry.transports.shm.peer import ShmHandle, _check_shape
from embferry.transports.tcp.transport import TcpHandle
from embferry.trust import Trust

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, as_msgpack

HOSTS = ("10.0.0.7", "::1", "2001:db8::1")
KINDS = (TcpHandle, HttpHandle, HttpAddress, NixlHandle, MooncakeHandle, ShmHandle)


class Handles(Target):
    documented = (TransportError,)
    nesting = (b"\x91", b"")
    inputs = 6000

    def tree(self, chance: Random) -> Tree:
        token, host, port = chance.randbytes(16), chance.choice(HOSTS), chance.randrange(1, 65536)
        file = [5, 1, 2, 4096]
        base = f"http://{f'[{host}]' if ':' in host else host}:{port}/a/b"
        return chance.choice(
            (
                [_tag(TcpHandle), host, port, token],
                [_tag(HttpHandle), token],
                [_tag(HttpAddress), base, token],
                [_tag(ShmHandle), "boot", 1, 2, 3, file, [6, 1, 3, 8 * 8], file, 8, [[0, 64], [512, 8]]],
            )
        )

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [as_msgpack(tree)]

    def run(self, pieces: Pieces) -> None:
        handle = b"".join(pieces)
        first: TransportError | None = None
        for kind in KINDS:
            try:
                decoded = decode_handle(handle, kind, "this")
            except TransportError as error:
                first = first or error
                continue
            assert decode_handle(msgspec.msgpack.encode(decoded), kind, "this") == decoded
            _use(decoded, handle)
            return
        assert first is not None
        raise first


def _tag(kind: type[msgspec.Struct]) -> Tree:
    """Returns the name and version that a handle begins with."""
    return kind.__struct_config__.tag


def _use(handle: msgspec.Struct, encoded: bytes) -> None:
    """Goes as far with a handle as is possible without a peer."""
    match handle:
        case HttpAddress():
            direct = parse_address(encoded, None, Trust())
            by_proxy = parse_address(encoded, ("192.0.2.9", 3128), Trust())
            assert by_proxy.authority == direct.authority, "a proxy reaches another sender"
            assert all(32 < ord(c) < 127 for c in direct.authority + direct.prefix), "a head could be split"
        case ShmHandle():
            _check_shape(handle)
        case TcpHandle() | NixlHandle() | MooncakeHandle():
            address.reachable(handle.host)
