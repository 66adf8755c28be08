"""An encode side that answers every `open` with an offer of its own making."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from embferry.protocol.messages import Frame, Offer, Open, decode, encode
from embferry.transfer.control.contract import Received
from embferry.transfer.control.sockets import SocketControl
from embferry.transports.net.loop import Loop

TURN_S = 0.05


class LyingPeer:
    """A context manager. ``reply`` returns the bytes of the answer to an `open`.

    Attributes:
        endpoint: what a language worker dials.
        answered: `open` messages that were answered.
    """

    def __init__(self, reply: Callable[[Frame, Open], bytes]) -> None:
        self._reply = reply
        self._loop = Loop()
        self._control = SocketControl(self._loop, host="127.0.0.1")
        self.endpoint = self._control.endpoint
        self.answered = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> LyingPeer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._control.close()
        self._loop.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._loop.run_once(TURN_S)
            for event in self._control.poll():
                if isinstance(event, Received):
                    frame = decode(event.data)
                    if isinstance(frame.body, Open):
                        self.answered += 1
                        self._control.send(event.peer, self._reply(frame, frame.body))


def offer(frame: Frame, asked: Open, total_tokens: int, **changes: Any) -> bytes:
    """Returns an offer for an `open`; ``changes`` replace its fields."""
    body = {
        "room": asked.room,
        "generation": asked.generation,
        "version": 1,
        "transport": asked.transports[0].name,
        "total_tokens": total_tokens,
        "content_digest": b"x",
        **changes,
    }
    return encode(Frame(frame.version, 99, frame.source, Offer(**body)))
