"""Producer: how an embedding comes from a worker to the scheduler, which serves it.

On the V1 runner nothing that a producer's worker says reaches the scheduler, so the two have a channel of their own: a
socket in the abstract name space, which vanishes with its owner. A worker waits until the scheduler has mapped the
embedding, so whatever a request needs is here when it finishes.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict

import msgspec
import numpy as np
import numpy.typing as npt
import zmq

from embferry.disaggregation.protocol.errors import TransportError

from .shared import Place, attach

log = logging.getLogger(__name__)

CLOSE_POLL_MS = 200


class Item(msgspec.Struct, frozen=True):
    """An embedding that a worker has just made."""

    mm_hash: str
    place: Place
    dtype: str
    width: int
    digest: bytes


class Kept(msgspec.Struct, frozen=True):
    """The same, as the scheduler has it."""

    item: Item
    rows: npt.NDArray[np.uint8]


class Shelf:
    """Takes embeddings in on a thread of its own; keeps the latest ``budget`` bytes."""

    def __init__(self, name: str, budget: int) -> None:
        self._budget = budget
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.REP)
        self._socket.bind(address(name))
        self._thread = threading.Thread(target=self._run, name="embferry-shelf", daemon=True)
        self._thread.start()

    def find(self, mm_hash: str) -> Kept | None:
        with self._lock:
            kept = self._kept.get(mm_hash)
            if kept is not None:
                self._kept.move_to_end(mm_hash)
            return kept

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()
        self._kept.clear()

    def _run(self) -> None:
        while not self._closing:
            if self._socket.poll(CLOSE_POLL_MS):
                self._socket.send(self._take(self._socket.recv()))

    def _take(self, message: bytes) -> bytes:
        """Answers with what went wrong; empty if nothing did."""
        try:
            item = msgspec.msgpack.decode(message, type=Item)
            self._put(Kept(item, attach(item.place)))
        except (msgspec.MsgspecError, OSError) as error:
            log.error("an embedding of a worker could not be taken in: %s", error)
            return str(error).encode()
        return b""

    def _put(self, kept: Kept) -> None:
        with self._lock:
            old = self._kept.pop(kept.item.mm_hash, None)
            self._bytes += kept.rows.nbytes - (0 if old is None else old.rows.nbytes)
            self._kept[kept.item.mm_hash] = kept
            while self._bytes > self._budget and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.rows.nbytes


class ToShelf:
    """A worker's end. Used by one thread."""

    def __init__(self, name: str, timeout: float) -> None:
        self._address, self._timeout_ms = address(name), int(timeout * 1000)

    def put(self, item: Item) -> None:
        """Returns when the scheduler has mapped it.

        :raises TransportError: it does not answer, or could not.
        """
        socket: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.REQ) as socket:
            socket.setsockopt(zmq.LINGER, 0)
            socket.connect(self._address)
            socket.send(msgspec.msgpack.encode(item))
            if not socket.poll(self._timeout_ms):
                raise TransportError(f"the scheduler has not taken an embedding within {self._timeout_ms} ms")
            problem = socket.recv()
        if problem:
            raise TransportError(f"the scheduler could not take an embedding: {problem.decode()}")


def address(name: str) -> str:
    return f"ipc://@embferry-vllm-{name}"
