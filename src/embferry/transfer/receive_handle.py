"""The receiving end of one room, as its users see it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embferry.memory.admission import PoolAdmission
from embferry.memory.blocks import MetadataAllocation
from embferry.memory.buffers import MultimodalDataBuffers, aux_row
from embferry.protocol.arguments import as_error, as_integer
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.messages import MAX_TOKENS
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import TERMINAL, KVPoll

from .control.endpoint import check_endpoint
from .fields import Array
from .handle import ENDED, Handle, Host
from .receive_record import ReceiveRecord
from .sinks import GatherSink, Sink, gathered


class ReceiveHost(Host, Protocol):
    """The manager, as far as a receiving end needs it."""

    geometry: Geometry
    buffers: MultimodalDataBuffers
    admission: PoolAdmission

    def check_allocation(self, record: ReceiveRecord, allocation: MetadataAllocation) -> None: ...

    def begin(self, record: ReceiveRecord, allocation: MetadataAllocation | None) -> None: ...

    def machine_of(self, record: ReceiveRecord) -> Receiver: ...

    def grant(self, record: ReceiveRecord, allocation: MetadataAllocation) -> int: ...

    def consumed(self, record: ReceiveRecord, epoch: int, offset: int) -> None: ...

    def left(self, endpoint: str) -> None: ...

    def guard(self, record: ReceiveRecord, call: Callable[..., object], *arguments: object) -> None: ...

    def touch(self, record: ReceiveRecord) -> None: ...


class EmbeddingReceiver(Handle):
    """The receiving end of one room. Made by :meth:`~.receive_manager.ReceiveManager.open`.

    Every method returns at once, and may be called from any thread.
    """

    def __init__(self, manager: ReceiveHost, record: ReceiveRecord) -> None:
        super().__init__(record.room, manager)
        self.manager = manager
        self._record = record
        self._reported = (KVPoll.Bootstrapping, 0, False)
        self._sink = record.sink
        record.end = self
        record.sink.owner = _SinkOwner(manager, record)

    @property
    def machine(self) -> Receiver:
        """The state machine, for reading.

        Raises:
            LocalProtocolError: :meth:`init` has not been called.
        """
        return self.manager.machine_of(self._record)

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self._record.error

    @property
    def endpoint(self) -> str:
        """Where the encode worker takes control messages."""
        return self._record.endpoint

    @property
    def transport(self) -> str:
        """Name of the transport in use; empty while none is."""
        return self.machine.transport

    @property
    def sink(self) -> Sink:
        """Where the data goes."""
        return self._sink

    def init(self, allocation: MetadataAllocation | None = None) -> None:
        """Asks for the embedding.

        Args:
            allocation: Blocks for the initial transfer, from ``manager.allocator.alloc(tokens, room)``. None: the pool
                grants blocks to this transfer in fair turn, without further calls.

        Raises:
            LocalProtocolError: Called twice, the manager is closed, this room does not hold the blocks, or
                they are in use.
        """
        with self.manager.lock:
            if allocation is not None:
                self.manager.check_allocation(self._record, allocation)
            self.manager.begin(self._record, allocation)
        self.manager.touch(self._record)

    def resume_transfer(self, allocation: MetadataAllocation | None = None, sent_tokens: int = 0) -> int:
        """Resumes the transfer for remaining data, from token ``sent_tokens`` on.

        Args:
            allocation: Blocks of the manager's allocator. None: the pool grants blocks in fair turn from now on.
            sent_tokens: The token to go on at.

        Returns:
            The number of tokens granted; 0 if granting is left to the pool.

        Raises:
            LocalProtocolError: ``sent_tokens`` is not the token to go on at, nothing remains, this room does not
                hold the blocks, or they are in use.
        """
        sent_tokens = as_integer("sent_tokens", sent_tokens, 0, MAX_TOKENS, room=self.room)
        with self.manager.lock:
            wanted = self.machine.wanted(self.manager.now())
            if wanted is not None and sent_tokens != wanted[0]:
                why = f"resume at token {wanted[0]}, not at {sent_tokens}"
                raise LocalProtocolError(why, room=self.room)
            if allocation is None:
                self.manager.admission.register(self.machine)
                tokens = 0
            else:
                self.manager.check_allocation(self._record, allocation)
                tokens = self.manager.grant(self._record, allocation)
        self.manager.touch(self._record)
        return tokens

    def redirect(self, endpoint: str) -> None:
        """Continues with the encode worker at ``endpoint``, which has the same content or can make it.

        Revokes the access of the last one first.

        Raises:
            LocalProtocolError: ``endpoint`` is malformed.
        """
        endpoint = check_endpoint(endpoint)
        with self.manager.lock:
            machine = self.machine
            last, self._record.endpoint = self._record.endpoint, endpoint
            self.manager.left(last)
            machine.redirected(self.manager.now())
        self.manager.touch(self._record)

    @property
    def lost(self) -> EmbeddingTransferError | None:
        """Why the encode worker is of no use any more, while this end waits for :meth:`redirect`.

        The wait takes ``failover_timeout`` seconds; then the transfer fails with that error. None: there is no such
        wait.
        """
        machine = self._record.machine
        with self.manager.lock:
            return None if machine is None or machine.phase in TERMINAL else machine.failover.lost

    def poll(self) -> KVPoll:
        """Returns where the transfer stands.

        Raises:
            LocalProtocolError: The manager was closed before the transfer had ended.
        """
        with self.manager.lock:
            state = self._record.poll()
            if state not in ENDED:
                self.manager.check()
            return state

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer and tells the sender why. Does nothing if it has ended already."""
        reason = None if error is None else as_error(error, room=self.room)
        with self.manager.lock:
            record = self._record
            if record.poll() in ENDED:
                return
            reason = reason or Aborted("aborted by the language side", room=self.room)
            record.failure = record.failure or reason
            if record.machine is not None:
                self.manager.guard(record, record.machine.abort, reason, self.manager.now())
        self.manager.touch(self._record)

    def clear(self) -> None:
        """Drops the arrays of the embedding and returns its blocks to the pool."""
        with self.manager.lock:
            machine = self._record.machine
            if machine is not None:
                self.manager.guard(self._record, machine.clear, self.manager.now())
                if self._record.poll() not in ENDED:  # the sink is not complete, and need not be any more
                    self._record.failure = Aborted("cleared by the language side", room=self.room)
        try:
            if isinstance(self.sink, GatherSink):
                with self._record.sink_lock:
                    self.sink.drop()
        except BaseException:
            for chunk in list(self._record.delivered):  # the caller reads none of them any more
                self.manager.consumed(self._record, *chunk)
            raise
        finally:
            if machine is not None:
                self.manager.touch(self._record)

    # What has arrived

    @property
    def total_embedding_length(self) -> int:
        """Tokens of the whole embedding; -1 while the length is unknown."""
        machine = self._record.machine
        return -1 if machine is None else machine.total_tokens

    @property
    def content_digest(self) -> bytes | None:
        """The digest that the sender has announced with the length; None while the length is unknown."""
        machine = self._record.machine
        return None if machine is None else machine.content_digest

    @property
    def aux(self) -> npt.NDArray[np.int32]:
        """``aux_datas`` of the embedding, int32 [16]: [0] is its length, [1] its mrope position delta.

        The rest is what the sender announced. All are 0 while the length is unknown.
        """
        with self.manager.lock:
            machine = self._record.machine
            if machine is None or machine.total_tokens < 0:
                return aux_row(0, ())
            return aux_row(machine.total_tokens, machine.aux)

    @property
    def transferred_tokens(self) -> int:
        """Verified tokens from token 0 on without a gap, which the sink has.

        Raises:
            EmbeddingTransferError: The transfer has failed.
            LocalProtocolError: The embedding has not been asked for.
        """
        with self.manager.lock:
            self.manager.machine_of(self._record)
            if self.error is not None:
                raise self.error.copied()
            return self._record.transferred_tokens

    @property
    def verified_tokens(self) -> int:
        """Tokens that were verified, damaged and repeated ones included."""
        return self._record.verified_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens that the sink had before, and that the sender need not send; 0 before it has announced its content."""
        machine, kept = self._record.machine, self._record.kept
        with self.manager.lock:
            if machine is None or kept is None or not machine.announcements:
                return 0
            is_same = (machine.total_tokens, machine.content_digest) == (kept.total_tokens, kept.content_digest)
            return kept.verified().size if is_same else 0

    @property
    def current_allocation(self) -> MetadataAllocation | None:
        """The blocks of the latest grant."""
        return self._record.latest

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain for which no blocks have been granted yet."""
        machine = self._record.machine
        with self.manager.lock:
            return machine is not None and machine.wanted(self.manager.now()) is not None

    @property
    def transfers(self) -> int:
        """Number of transfers so far: one initial, every further one resumed."""
        machine = self._record.machine
        return 0 if machine is None else machine.transfers

    def buffered_chunks(self) -> dict[str, Array] | None:
        """Returns the tokens gathered so far without a gap, or None. Unlike :meth:`arrays`, commits to nothing."""
        with self._record.sink_lock, self.manager.lock:
            if not isinstance(self.sink, GatherSink) or not self.sink.arrays or self._record.restarts:
                return None
            tokens = self._record.transferred_tokens
            return {name: array[:tokens] for name, array in self.sink.arrays.items()}

    def arrays(self) -> dict[str, Array]:
        """Returns the gathered fields, uint8 [total tokens, bytes a token], final below ``transferred_tokens``.

        Reading commits: from now on another content for the room is an error. Valid until :meth:`clear`.

        Raises:
            LocalProtocolError: Nothing has arrived yet, or the sink does not gather.
        """
        with self._record.sink_lock:
            arrays = gathered(self.sink).arrays
            if not arrays or not self.sink.owner.commit():
                raise LocalProtocolError("nothing has arrived yet", room=self.room)
            return arrays

    def _state(self) -> tuple[object, ...]:
        machine = self._record.machine
        if machine is None:
            return self._record.poll(), 0, False
        return self._record.poll(), self._record.transferred_tokens, machine.failover.lost is not None


class _SinkOwner:
    """The transfer, as far as its sink needs it."""

    def __init__(self, manager: ReceiveHost, record: ReceiveRecord) -> None:
        self._manager, self._record = manager, record
        self.committed = False

    @property
    def buffers(self) -> MultimodalDataBuffers:
        return self._manager.buffers

    @property
    def content_digest(self) -> bytes:
        with self._manager.lock:
            machine = self._record.machine
            return b"" if machine is None else machine.content_digest or b""

    @property
    def lock(self) -> AbstractContextManager[object]:
        return self._record.sink_lock

    def commit(self) -> bool:
        with self._manager.lock:
            machine = self._record.machine
            if self._record.restarts or machine is None or not machine.announcements:
                return False  # of tokens that were here before, it is not known yet whether they are still the content
            machine.committed = self.committed = True
            return True

    def consumed(self, epoch: int, offset: int) -> None:
        self._manager.consumed(self._record, epoch, offset)

    def copied(self) -> None:
        self._manager.touch(self._record)

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        self._record.end.abort(error)
