"""The receiving end of one room, as its users see it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation, blocks_needed
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import TERMINAL, KVPoll

from .driver import check_endpoint
from .sinks import GatherSink, Sink, gathered

if TYPE_CHECKING:
    from .receive_manager import ReceiveManager

log = logging.getLogger(__name__)


class EmbeddingReceiver:
    """The receiving end of one room. Made by :meth:`ReceiveManager.open`. Every method returns at once."""

    def __init__(
        self,
        manager: ReceiveManager,
        room: int,
        endpoint: str,
        sink: Sink,
        failover_timeout: float | None = None,
    ) -> None:
        self.manager = manager
        self.room = room
        self.endpoint = endpoint
        self.sink = sink
        self.failover_timeout = failover_timeout
        self.examined_tokens = 0
        """That came and were looked at, those included that were damaged or came again."""
        self._machine: Receiver | None = None
        self._allocation: MetadataAllocation | None = None
        self.current_allocation: MetadataAllocation | None = None
        """The blocks of the latest grant."""
        self.epochs: list[int] = []
        """Of all its grants."""
        self.checks: deque[Verify] = deque()
        """Chunks that are here and have not been looked at, or not to their end."""
        self.examination: Generator[None, None, bool] | None = None
        """Of the first of them."""
        self._on_change: list[Callable[[], object]] = []
        self._reported: tuple[KVPoll, int, bool] = (KVPoll.Bootstrapping, 0, False)
        sink.owner = self

    @property
    def machine(self) -> Receiver:
        if self._machine is None:
            raise LocalProtocolError("call init() first", room=self.room)
        return self._machine

    def init(self, allocation: MetadataAllocation | None = None) -> None:
        """Asks for the embedding.

        :param allocation: blocks for the initial transfer, from ``manager.allocator.alloc(tokens, room)``; if None,
            this transfer and its resumed ones are given blocks in turn, without further calls.
        """
        with self.manager.lock:
            if self._machine is not None:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            self._machine = self.manager.begin(self)
            self._allocation = allocation
            if allocation is None:
                self.manager.admission.join(self._machine)
        self.manager.touch(self)

    def resume_transfer(self, allocation: MetadataAllocation | None = None, sent_tokens: int = 0) -> int:
        """Resumes the transfer for remaining data, from token ``sent_tokens`` on.

        :param allocation: blocks of the manager's allocator; if None, the pool gives blocks in turn from now on.
        :returns: the tokens asked for; 0 if that is left to the pool.
        :raises LocalProtocolError: ``sent_tokens`` is not the token to go on at, or nothing remains.
        """
        with self.manager.lock:
            now = self.manager.now()
            wanted = self.machine.wanted(now)
            if wanted is not None and sent_tokens != wanted[0]:
                why = f"resume at token {wanted[0]}, not at {sent_tokens}"
                raise LocalProtocolError(why, room=self.room)
            if allocation is None:
                self.manager.admission.join(self.machine)
                tokens = 0
            else:
                tokens = self._grant(allocation, now)
        self.manager.touch(self)
        return tokens

    def redirect(self, endpoint: str) -> None:
        """Another encode worker, at ``endpoint``, has or can make the same content: go on with it where this stands.

        What the old one may still write to is taken from it first."""
        with self.manager.lock:
            self.endpoint = check_endpoint(endpoint)
            self.machine.redirected(self.manager.now())
        self.manager.touch(self)

    @property
    def lost(self) -> EmbeddingTransferError | None:
        """Why the encode worker is of no use any more, while this waits for :meth:`redirect`: for
        ``failover_timeout``, then it fails with that error. None: it goes on, has ended, or was not to wait."""
        with self.manager.lock:
            if self._machine is None or self._machine.phase in TERMINAL:
                return None
            return self._machine.failover.lost

    def poll(self) -> KVPoll:
        """Where the transfer stands."""
        with self.manager.lock:
            self.manager.check()
            return KVPoll.Bootstrapping if self._machine is None else self._machine.poll()

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer; the sender is told why. Does nothing when it has ended already."""
        with self.manager.lock:
            if self._machine is not None:
                self._machine.abort(
                    error or Aborted("aborted by the language side", room=self.room), self.manager.now()
                )
        self.manager.touch(self)

    def clear(self) -> None:
        """The caller is through with the embedding: its arrays are dropped, its blocks go back to the pool."""
        with self.manager.lock:
            if self._machine is not None:
                self._machine.clear(self.manager.now())
            if isinstance(self.sink, GatherSink):
                self.sink.drop()
        self.manager.touch(self)

    def failure_exception(self) -> EmbeddingTransferError:
        """Why it failed.

        :raises LocalProtocolError: it has not failed.
        """
        with self.manager.lock:
            if self.machine.error is None:
                raise LocalProtocolError(f"the transfer has not failed: {self.machine.phase.value}", room=self.room)
            return self.machine.error

    # What has arrived

    @property
    def total_embedding_length(self) -> int:
        """Tokens of the whole embedding; -1 while it is not known."""
        return -1 if self._machine is None else self._machine.total_tokens

    @property
    def transferred_tokens(self) -> int:
        """Tokens from the first on that are here and verified. Raises the transfer's error if it failed."""
        with self.manager.lock:
            self.manager.check()
            if self.machine.error is not None:
                raise self.machine.error
            return self.machine.transferred_tokens

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain for which no blocks have been granted yet."""
        with self.manager.lock:
            return self._machine is not None and self._machine.wanted(self.manager.now()) is not None

    @property
    def transfers(self) -> int:
        """How many transfers so far: one initial, the others resumed."""
        return 0 if self._machine is None else self._machine.transfers

    def buffered_chunks(self) -> dict[str, npt.NDArray[np.uint8]] | None:
        """What has been gathered so far without a gap, or None. A look: unlike :meth:`arrays` it commits to nothing."""
        with self.manager.lock:
            if not isinstance(self.sink, GatherSink) or not self.sink.arrays:
                return None
            tokens = self.machine.transferred_tokens
            return {name: array[:tokens] for name, array in self.sink.arrays.items()}

    def arrays(self) -> dict[str, npt.NDArray[np.uint8]]:
        """The gathered fields, uint8 [total tokens, bytes a token]: rows below ``transferred_tokens`` are final.

        Reading commits: from now on the content must stay what it is. Valid until :meth:`clear`.

        :raises LocalProtocolError: nothing has arrived yet, or this receiver hands its chunks on.
        """
        with self.manager.lock:
            arrays = gathered(self.sink).arrays
            if not arrays:
                raise LocalProtocolError("nothing has arrived yet", room=self.room)
            self.commit()
            return arrays

    def on_change(self, callback: Callable[[], object]) -> None:
        """``callback`` is called, from the manager's thread, when ``poll()``, ``transferred_tokens`` or whether it is
        ``lost`` has changed."""
        self._on_change.append(callback)

    # The manager's side; its lock is held

    def deliver(self, chunk: Deliver) -> None:
        if chunk.offset == 0:
            aux = self.machine.aux
            self.manager.buffers.aux_datas[chunk.blocks[0], : len(aux)] = aux
            self.manager.buffers.aux_datas[chunk.blocks[0], 0] = self.machine.total_tokens
        self.sink.deliver(chunk, self.machine.total_tokens)

    def granted(self, epoch: int) -> None:
        """The machine has just made a grant."""
        grant = self.machine.ledger.grants[epoch]
        self.current_allocation = MetadataAllocation(grant.blocks, grant.block_size)
        self.sink.granted(grant.epoch, grant.start, grant.blocks)
        if self.machine.transfers > 1:
            log.debug(
                "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d, blocks %d",
                *(self.room, grant.start, grant.tokens, len(grant.blocks)),
            )

    def notify(self, *, force: bool = False) -> None:
        if self._allocation is not None and self.machine.wanted(self.manager.now()) is not None:
            allocation, self._allocation = self._allocation, None
            self._grant(allocation, self.manager.now())
            self.manager.touch(self)
        state = (self.machine.poll(), self.machine.transferred_tokens, self.machine.failover.lost is not None)
        if force or state != self._reported:
            self._reported = state
            for callback in self._on_change:
                callback()

    def _grant(self, allocation: MetadataAllocation, now: float) -> int:
        """Grants the caller's blocks; those beyond what remains go back to the pool at once."""
        wanted = self.machine.wanted(now)
        if wanted is None:
            raise LocalProtocolError("nothing remains to be granted now", room=self.room)
        needed = blocks_needed(wanted[1], allocation.block_size)
        if spare := allocation.blocks[needed:]:
            self.manager.allocator.free(spare, self.room)
        fitting = MetadataAllocation(allocation.blocks[:needed], allocation.block_size)
        tokens = self.manager.admission.grant(self.machine, fitting, now)
        self.granted(self.machine.ledger.next_epoch - 1)
        return tokens

    # The sink's side

    @property
    def buffers(self) -> MultimodalDataBuffers:
        return self.manager.buffers

    @property
    def lock(self) -> AbstractContextManager[object]:
        return self.manager.lock

    def commit(self) -> None:
        """Tokens are used: from now on the content must stay what it is."""
        self.machine.committed = True

    def consumed(self, epoch: int, offset: int) -> None:
        """A delivered chunk's blocks are no longer read."""
        with self.manager.lock:
            self.machine.consumed(epoch, offset)
        self.manager.touch(self)
