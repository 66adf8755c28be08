"""A socket that delivers the pieces of an input, and a loop that does nothing by itself."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .raw import Pieces


class ArrivingSocket:
    """Delivers one piece after the other; between two of them, and before the end, it would block.

    Attributes:
        sent: What was sent, in order.
        closed: Whether it was closed.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = deque(piece for piece in pieces if piece)
        self._now = memoryview(b"")
        self.sent = bytearray()
        self.closed = False

    def arrive(self) -> bool:
        """Lets the next piece arrive, or the end if there is none. Returns False for the end."""
        if self._pieces:
            self._now = memoryview(bytes(self._now) + self._pieces.popleft())
            return True
        self._ended = True
        return False

    _ended = False

    @property
    def has_bytes(self) -> bool:
        """Whether bytes have arrived that nothing has taken."""
        return bool(self._now)

    def _take(self, count: int, flags: int = 0) -> memoryview:
        if not self._now and not self._ended:
            raise BlockingIOError
        taken = self._now[:count]
        if not flags & socket.MSG_PEEK:
            self._now = self._now[count:]
        return taken

    def recv(self, count: int, flags: int = 0) -> bytes:
        return bytes(self._take(count, flags))

    def recv_into(self, buffer: memoryview) -> int:
        taken = self._take(len(buffer))
        memoryview(buffer)[: len(taken)] = taken
        return len(taken)

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int, list[Any], int, None]:
        total = 0
        for buffer in buffers:
            if len(buffer) and (self._now or not total):
                count = self.recv_into(buffer)
                total += count
                if count < len(buffer):
                    break
        return total, [], 0, None

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        return self.send(b"".join(buffers))

    def fileno(self) -> int:
        return 0

    def setblocking(self, blocking: bool) -> None: ...
    def shutdown(self, how: int) -> None: ...

    def close(self) -> None:
        self.closed = True


class StillLoop:
    """Stands for a loop and its scopes: calls run at once, timers never, and exceptions reach the caller."""

    def scope(self, on_failure: Callable[[BaseException], None]) -> StillLoop:
        return self

    @property
    def loop(self) -> StillLoop:
        return self

    def call(self, what: Callable[[], object]) -> None:
        what()

    def run(self, what: Callable[..., object], *arguments: object) -> bool:
        what(*arguments)
        return True

    def now(self) -> float:
        return 0.0

    def later(self, delay_s: float, what: Callable[[], object]) -> bool:
        return True

    def watch(self, fd: int, events: int, ready: Callable[[int], None]) -> None: ...
    def unwatch(self, fd: int) -> None: ...
    def end(self) -> None: ...


def arrivals(stream: bytes, cuts: list[int]) -> Pieces:
    """Returns a stream in pieces that end at ``cuts``."""
    ends = sorted({min(max(cut, 0), len(stream)) for cut in cuts} | {len(stream)})
    return [stream[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start]
