"""The receiving end of one room, as its users see it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator
from contextlib import AbstractContextManager
from typing import Protocol

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import TERMINAL, KVPoll

from .driver import check_endpoint
from .fields import Array
from .handle import Handle, Host
from .sinks import GatherSink, Sink, gathered

log = logging.getLogger(__name__)


class ReceiveHost(Host, Protocol):
    """The manager, as far as a receiving end needs it."""

    geometry: Geometry
    buffers: MultimodalDataBuffers
    allocator: ReqToMetadataBlockAllocator
    admission: PoolAdmission

    def begin(self, receiver: EmbeddingReceiver) -> Receiver:
        """Makes and registers the state machine of a receiver. The lock is held."""
        ...

    def touch(self, receiver: EmbeddingReceiver) -> None:
        """Queues the receiver to be processed by the driver thread."""


class EmbeddingReceiver(Handle):
    """The receiving end of one room. Made by :meth:`~.receive_manager.ReceiveManager.open`.

    Every method returns at once.

    Attributes:
        endpoint: Where the encode worker takes control messages.
        sink: Where the data goes.
        examined_tokens: Tokens that were verified, damaged and repeated ones included.
        current_allocation: The blocks of the latest grant.
        epochs: The epochs of all its grants.
        checks: Chunks that wait for verification, or whose verification has not ended.
        verification: The running verification of the first of them.
    """

    def __init__(
        self,
        manager: ReceiveHost,
        room: int,
        endpoint: str,
        sink: Sink,
        failover_timeout: float | None = None,
    ) -> None:
        super().__init__(room, manager)
        self.manager = manager
        self.endpoint = endpoint
        self.sink = sink
        self.failover_timeout = failover_timeout
        self.examined_tokens = 0
        self.current_allocation: MetadataAllocation | None = None
        self.epochs: list[int] = []
        self.checks: deque[Verify] = deque()
        self.verification: Generator[None, None, bool] | None = None
        self._machine: Receiver | None = None
        self._allocation: MetadataAllocation | None = None
        self._reported = (KVPoll.Bootstrapping, 0, False)
        sink.owner = self

    @property
    def machine(self) -> Receiver:
        if self._machine is None:
            raise LocalProtocolError("call init() first", room=self.room)
        return self._machine

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self.machine.error

    def init(self, allocation: MetadataAllocation | None = None) -> None:
        """Asks for the embedding.

        Args:
            allocation: Blocks for the initial transfer, from ``manager.allocator.alloc(tokens, room)``. None: the pool
                grants blocks to this transfer in fair turn, without further calls.

        Raises:
            LocalProtocolError: Called twice.
        """
        with self.manager.lock:
            if self._machine is not None:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            self._machine = self.manager.begin(self)
            self._allocation = allocation
            if allocation is None:
                self.manager.admission.register(self._machine)
        self.manager.touch(self)

    def resume_transfer(self, allocation: MetadataAllocation | None = None, sent_tokens: int = 0) -> int:
        """Resumes the transfer for remaining data, from token ``sent_tokens`` on.

        Args:
            allocation: Blocks of the manager's allocator. None: the pool grants blocks in fair turn from now on.
            sent_tokens: The token to go on at.

        Returns:
            The number of tokens granted; 0 if granting is left to the pool.

        Raises:
            LocalProtocolError: ``sent_tokens`` is not the token to go on at, or nothing remains.
        """
        with self.manager.lock:
            now = self.manager.now()
            wanted = self.machine.wanted(now)
            if wanted is not None and sent_tokens != wanted[0]:
                why = f"resume at token {wanted[0]}, not at {sent_tokens}"
                raise LocalProtocolError(why, room=self.room)
            if allocation is None:
                self.manager.admission.register(self.machine)
                tokens = 0
            else:
                tokens = self._grant(allocation, now)
        self.manager.touch(self)
        return tokens

    def redirect(self, endpoint: str) -> None:
        """Continues with the encode worker at ``endpoint``, which has the same content or can make it.

        Revokes the access of the last one first.

        Raises:
            LocalProtocolError: ``endpoint`` is malformed.
        """
        with self.manager.lock:
            self.endpoint = check_endpoint(endpoint)
            self.machine.redirected(self.manager.now())
        self.manager.touch(self)

    @property
    def lost(self) -> EmbeddingTransferError | None:
        """Why the encode worker is of no use any more, while this end waits for :meth:`redirect`.

        The wait takes ``failover_timeout`` seconds; then the transfer fails with that error. None: there is no such
        wait.
        """
        with self.manager.lock:
            if self._machine is None or self._machine.phase in TERMINAL:
                return None
            return self._machine.failover.lost

    def poll(self) -> KVPoll:
        """Returns where the transfer stands.

        Raises:
            LocalProtocolError: The manager is closed or has failed.
        """
        with self.manager.lock:
            self.manager.check()
            return KVPoll.Bootstrapping if self._machine is None else self._machine.poll()

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer and tells the sender why. Does nothing if it has ended already."""
        with self.manager.lock:
            if self._machine is not None:
                reason = error or Aborted("aborted by the language side", room=self.room)
                self._machine.abort(reason, self.manager.now())
        self.manager.touch(self)

    def clear(self) -> None:
        """The caller needs the embedding no longer: drops its arrays and returns its blocks to the pool."""
        with self.manager.lock:
            if self._machine is not None:
                self._machine.clear(self.manager.now())
            if isinstance(self.sink, GatherSink):
                self.sink.drop()
        self.manager.touch(self)

    # What has arrived

    @property
    def total_embedding_length(self) -> int:
        """Tokens of the whole embedding; -1 while the length is unknown."""
        return -1 if self._machine is None else self._machine.total_tokens

    @property
    def transferred_tokens(self) -> int:
        """Verified tokens from token 0 on without a gap.

        Raises:
            EmbeddingTransferError: The transfer has failed.
        """
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
        """Number of transfers so far: one initial, every further one resumed."""
        return 0 if self._machine is None else self._machine.transfers

    def buffered_chunks(self) -> dict[str, Array] | None:
        """Returns the tokens gathered so far without a gap, or None. Unlike :meth:`arrays`, commits to nothing."""
        with self.manager.lock:
            if not isinstance(self.sink, GatherSink) or not self.sink.arrays:
                return None
            tokens = self.machine.transferred_tokens
            return {name: array[:tokens] for name, array in self.sink.arrays.items()}

    def arrays(self) -> dict[str, Array]:
        """Returns the gathered fields, uint8 [total tokens, bytes a token], final below ``transferred_tokens``.

        Reading commits: from now on another content for the room is an error. Valid until :meth:`clear`.

        Raises:
            LocalProtocolError: Nothing has arrived yet, or the sink does not gather.
        """
        with self.manager.lock:
            arrays = gathered(self.sink).arrays
            if not arrays:
                raise LocalProtocolError("nothing has arrived yet", room=self.room)
            self.commit()
            return arrays

    # Called by the manager, which holds its lock

    def deliver(self, chunk: Deliver) -> None:
        """Hands a verified chunk to the sink."""
        if chunk.offset == 0:
            self.manager.buffers.write_aux(chunk.blocks[0], self.machine.total_tokens, self.machine.aux)
        self.sink.deliver(chunk, self.machine.total_tokens)

    def granted(self, epoch: int) -> None:
        """Takes note of the grant that the machine has just made."""
        grant = self.machine.ledger.grants[epoch]
        self.current_allocation = MetadataAllocation(grant.blocks, grant.block_size)
        self.sink.granted(grant.epoch, grant.start, grant.blocks)
        if self.machine.transfers > 1:
            log.debug(
                "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d, blocks %d",
                *(self.room, grant.start, grant.tokens, len(grant.blocks)),
            )

    def notify(self, *, force: bool = False) -> None:
        """Grants the blocks given to :meth:`init` as soon as possible, then calls the callbacks."""
        if self._allocation is not None and self.machine.wanted(self.manager.now()) is not None:
            allocation, self._allocation = self._allocation, None
            self._grant(allocation, self.manager.now())
            self.manager.touch(self)
        super().notify(force=force)

    def _state(self) -> tuple[object, ...]:
        return self.machine.poll(), self.machine.transferred_tokens, self.machine.failover.lost is not None

    def _grant(self, allocation: MetadataAllocation, now: float) -> int:
        """Grants the caller's blocks. Blocks beyond what remains return to the pool at once."""
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

    # Called by the sink

    @property
    def buffers(self) -> MultimodalDataBuffers:
        return self.manager.buffers

    @property
    def lock(self) -> AbstractContextManager[object]:
        return self.manager.lock

    def commit(self) -> None:
        """Tokens are in use: from now on another content for the room is an error."""
        self.machine.committed = True

    def consumed(self, epoch: int, offset: int) -> None:
        """The blocks of a delivered chunk are no longer read. Any thread."""
        with self.manager.lock:
            self.machine.consumed(epoch, offset)
        self.manager.touch(self)
