"""Producer: how an embedding comes from a worker to the scheduler, which serves it.

On the V1 runner nothing that a producer's worker says reaches the scheduler, so the two have a channel of their own: a
socket in the abstract name space, which vanishes with its owner. A worker waits until the scheduler has mapped the
embedding, so whatever a request needs is here when it finishes.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable

import msgspec
import zmq

from embferry.protocol.errors import TransportError

from .shared import Fields, Place, SharedRows
from .tally import Tally

log = logging.getLogger(__name__)

CLOSE_POLL_MS = 200
MAX_KEPT = 512
"""Each takes a file descriptor."""


class Item(msgspec.Struct, frozen=True):
    """An embedding that a worker has. ``encoded``: it has just made it; else it had it from before."""

    mm_hash: str
    place: Place
    dtype: str
    width: int
    digest: bytes
    encoded: bool = True


class Kept:
    """The same, as the scheduler has it."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.shared = SharedRows.take(item.place)
        self.is_new = item.encoded  # and has not been offered yet

    @property
    def rows(self) -> Fields:
        return self.shared.rows

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes


class Shelf:
    """Takes embeddings in on a thread of its own; keeps the latest ``budget`` bytes, and what requests hold."""

    def __init__(self, name: str, budget: int, tally: Tally) -> None:
        self._budget, self._tally = budget, tally
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._holds: Counter[str] = Counter()
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

    def hold(self, names: Iterable[str]) -> None:
        """A running request needs these: they stay, if they are here or when they come."""
        with self._lock:
            self._holds.update(names)

    def release(self, names: Iterable[str]) -> None:
        """The end of :meth:`hold`."""
        with self._lock:
            self._holds.subtract(names)
            self._holds = +self._holds
            self._evict()

    def put(self, kept: Kept) -> None:
        """As the latest one; of its name there is one. One that a rank may still be about to map stays that one."""
        with self._lock:
            old = self._kept.pop(kept.item.mm_hash, None)
            if old is not None:
                self._bytes -= old.nbytes
                if old is not kept and old.shared.is_lent:
                    old, kept = kept, old
                if old is not kept:
                    old.shared.close()
            self._bytes += kept.nbytes
            self._kept[kept.item.mm_hash] = kept
            self._evict()

    @property
    def nbytes(self) -> int:
        return self._bytes

    def close(self) -> None:
        self._closing = True
        self._thread.join()
        self._socket.close(linger=0)
        self._context.term()
        for kept in self._kept.values():
            kept.shared.close()
        self._kept.clear()

    def _run(self) -> None:
        while not self._closing:
            if self._socket.poll(CLOSE_POLL_MS):
                self._socket.send(self._take(self._socket.recv()))

    def _take(self, message: bytes) -> bytes:
        """Answers with what went wrong; empty if nothing did."""
        try:
            kept = Kept(msgspec.msgpack.decode(message, type=Item))
        except (msgspec.MsgspecError, OSError, ValueError) as error:
            log.error("an embedding of a worker could not be taken in: %s", error)
            return str(error).encode()
        if kept.item.encoded:
            self._tally.add("items_encoded")
        self.put(kept)
        return b""

    def _evict(self) -> None:
        for mm_hash, kept in list(self._kept.items()):
            if (self._bytes <= self._budget and len(self._kept) <= MAX_KEPT) or len(self._kept) == 1:
                return
            if mm_hash not in self._holds and not kept.shared.is_lent:
                del self._kept[mm_hash]
                self._bytes -= kept.nbytes
                kept.shared.close()


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
