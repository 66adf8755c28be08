"""A sender's Mooncake engine, which is exchanged for a new one after a failure."""

from __future__ import annotations

from collections.abc import Callable

from embferry.protocol.errors import TransportError

from ..engine_thread import WriteEngine, WriteFailedError
from ..jobs import Run
from .engine import Engine

SLICE_BYTES = 4 << 20
MAX_BYTES = 32 << 20  # what cannot be stopped any more


class MooncakeWriteEngine(WriteEngine):
    """Writes to the peer that engines know as ``segment``.

    After a failure the engine is exchanged as soon as nothing is under way. The old one remembers connections that
    failed, and for a second answers everything with failure; and it keeps what it once learned of the peer for good.
    """

    max_requests = 64  # the engine queues what its connections cannot take, but not without limit

    def __init__(self, open_engine: Callable[[], Engine], segment: str, registers_sources: bool) -> None:
        self._open_engine, self._segment, self.registers_sources = open_engine, segment, registers_sources
        self.slice_bytes, self.max_bytes = SLICE_BYTES, MAX_BYTES
        self._engine = open_engine()
        self._registered: dict[int, int] = {}
        self._failed = False

    def register(self, address: int, length: int) -> int:
        self._engine.register(address, length)
        self._registered[address] = length
        return address

    def deregister(self, registered: int) -> None:
        del self._registered[registered]
        self._engine.unregister(registered)

    def ready(self, *, idle: bool) -> bool:
        if self._failed and idle:
            self._engine.close()
            self._engine = self._open_engine()
            for address, length in self._registered.items():
                self._engine.register(address, length)
            self._failed = False
        return not self._failed

    def start(self, part: list[Run]) -> int:
        ((source, target, length),) = part
        ticket = self._engine.submit(self._segment, source, target, length)
        if not ticket:
            self._failed = True
            raise WriteFailedError("the Mooncake engine could not start a write; its log says why")
        return ticket

    def is_over(self, request: int) -> bool:
        outcome = self._engine.outcome(request)
        if outcome == -2:
            raise TransportError("the Mooncake engine's own time limit passed with a write under way")
        if outcome not in (0, 1):
            self._failed = True
            raise WriteFailedError("the Mooncake engine could not complete a write; its log says why")
        return outcome == 1

    def close(self) -> None:
        self._engine.close()
