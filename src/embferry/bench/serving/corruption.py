"""Bytes that change between an encoder and a language instance, where they can be reached from outside."""

from __future__ import annotations

import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from .gate import Params
from .relay import Relay

DAMAGE_EVERY = 1_500_000
"""Bytes of embeddings between two that are damaged: one in three or four, and seldom the same one again."""
TAIL = 0.25
"""Of a file, zeroed: as of one that was cut short."""
TCP_HANDLE = b"\xaeembferry-tcp-1"
"""How a receiver's handle begins when it goes to the sender: the address of its data link comes next."""
PORT16 = 0xCD


class ZeroedTails:
    """Of the example connector's files, some have their tails zeroed when they have been written and nobody has read
    them."""

    def __init__(self, store: Path) -> None:
        self._store, self._turn = store, _Turn()
        self.done = 0

    def __enter__(self) -> ZeroedTails:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""

    def change(self, params: Params) -> Params:
        for mm_hash in params:
            path = self._store / mm_hash / "encoder_cache.safetensors"
            size = path.stat().st_size
            if not self._turn.comes(size):
                continue
            with path.open("r+b") as file:
                file.seek(int(size * (1 - TAIL)))
                file.write(bytes(size - file.tell()))
            self.done += 1
        return params


class FlippedBits:
    """Our ``tcp`` transport: the way from encoder to language instance leads through a relay that flips bits.

    The receiver tells the sender where its data link listens; that word, too, goes through a relay, which names
    the one that flips instead."""

    def __init__(self) -> None:
        self._relays = ExitStack()
        self._control: dict[int, int] = {}
        self._data: dict[int, int] = {}
        self._lock = threading.Lock()
        self.done = 0

    def __enter__(self) -> FlippedBits:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._relays.close()

    def change(self, params: Params) -> Params:
        return {mm_hash: self._redirected(entry) for mm_hash, entry in params.items()}

    def _redirected(self, entry: dict[str, Any]) -> dict[str, Any]:
        if "embferry" not in entry:
            return entry
        address, _, port = entry["embferry"]["endpoint"].rpartition(":")
        with self._lock:
            if int(port) not in self._control:
                self._control[int(port)] = self._relays.enter_context(Relay(int(port), self._name_another)).port
        return entry | {"embferry": entry["embferry"] | {"endpoint": f"{address}:{self._control[int(port)]}"}}

    def _name_another(self, data: bytes) -> bytes:
        changed, at = bytearray(data), data.find(TCP_HANDLE)
        while at >= 0:
            port_at = at + len(TCP_HANDLE)
            port_at += 1 + (data[port_at] & 0x1F) if port_at < len(data) else 0
            if port_at + 3 <= len(data) and data[port_at] == PORT16:
                (port,) = struct.unpack_from(">H", data, port_at + 1)
                struct.pack_into(">H", changed, port_at + 1, self._flipping(port))
            at = data.find(TCP_HANDLE, at + 1)
        return bytes(changed)

    def _flipping(self, port: int) -> int:
        with self._lock:
            if port not in self._data:
                self._data[port] = self._relays.enter_context(Relay(port, _Flips(self))).port
            return self._data[port]


class _Flips:
    """Over all connections of a relay."""

    def __init__(self, owner: FlippedBits) -> None:
        self._owner, self._turn = owner, _Turn()

    def __call__(self, data: bytes) -> bytes:
        if not data or not self._turn.comes(len(data)):
            return data
        self._owner.done += 1
        changed = bytearray(data)
        changed[len(changed) // 2] ^= 0x10
        return bytes(changed)


class _Turn:
    """Counts bytes; says when so many have gone by that something is to be damaged. The first time comes sooner."""

    def __init__(self) -> None:
        self._left = DAMAGE_EVERY // 5
        self._lock = threading.Lock()

    def comes(self, size: int) -> bool:
        with self._lock:
            self._left -= size
            if self._left > 0:
                return False
            self._left = DAMAGE_EVERY
            return True
