"""The receiving end of one room, as its users see it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation
from embferry.memory.buffers import AUX_WIDTH
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.states import KVPoll
from embferry.transfer.handle import Handle, Host
from embferry.transfer.waiting import wait

from ..wire.receiver_room import ReceiverRoom
from .encode_ranks import EncodeRank
from .pool_mapping import PoolMapping
from .write_marks import WriteMarks

Arrays = dict[str, npt.NDArray[np.uint8]]


class LanguageHost(Host, Protocol):
    """The manager, as far as a receiving end needs it. Its lock is held during the last three methods."""

    def wake(self) -> None: ...
    def allocate(self, tokens: int, room: int) -> MetadataAllocation | None: ...
    def begin(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation | None) -> None: ...
    def resume(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation | None) -> int: ...
    def fail(self, receiver: MooncakeEmbeddingReceiver, error: EmbeddingTransferError) -> None: ...


class MooncakeEmbeddingReceiver(Handle):
    """The receiving end of one room, for senders of the origin. Made by :meth:`LanguageManager.open`.

    Attributes:
        bootstrap_addr: URL of the bootstrap server of the encode side.
        current_allocation: Blocks of the latest request.
        aux: ``aux_datas`` of the embedding once tokens have arrived, int32 [16]: [0] is its length, [1] its mrope
            position delta.
    """

    def __init__(self, manager: LanguageHost, machine: ReceiverRoom, bootstrap_addr: str) -> None:
        super().__init__(machine.room, manager)
        self.manager, self.machine = manager, machine
        self.bootstrap_addr = bootstrap_addr if "://" in bootstrap_addr else f"http://{bootstrap_addr}"
        self.current_allocation: MetadataAllocation | None = None
        self.aux: npt.NDArray[np.int32] = np.zeros(AUX_WIDTH, np.int32)
        self._begun = False
        self._reported = (KVPoll.Bootstrapping, 0)
        # For the manager
        self.gathered: Arrays = {}  # what tokens are gathered into, once the first have arrived
        self.encode_rank: EncodeRank | None = None  # once it is found
        self.mapping: PoolMapping | None = None  # through which the encode rank writes, once it was asked
        self.marks: WriteMarks | None = None  # of the round that is being transferred
        self.granted: MetadataAllocation | None = None  # given to init() and not used yet
        self.automatic = False  # the manager allocates blocks for the rest of the transfer

    def init(self, allocation: MetadataAllocation | None = None) -> None:
        """Asks for the embedding.

        Args:
            allocation: Blocks for the initial transfer, from ``manager.allocate(tokens, room)``; every further part is
                then requested with :meth:`resume_transfer`. If None, the manager allocates blocks for this transfer
                and its resumed ones. Ranks that share a room must request the same number of blocks, so give them.

        Raises:
            LocalProtocolError: ``init()`` was called before, or the room is in use.
            TransportError: The engine cannot start.
        """
        with self.manager.lock:
            if self._begun:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            self.manager.begin(self, allocation)
            self._begun = True
        self.manager.wake()

    def resume_transfer(self, allocation: MetadataAllocation | None = None, sent_tokens: int = 0) -> int:
        """Resumes the transfer for remaining data, from token ``sent_tokens`` on.

        Args:
            allocation: Blocks from ``manager.allocate``; those that are not needed go back at once. If None, the
                manager allocates blocks from now on.
            sent_tokens: Must be ``transferred_tokens``.

        Returns:
            Number of tokens requested; 0 if the manager requests them later.

        Raises:
            LocalProtocolError: The transfer does not need it (see :attr:`needs_resume`), or stands at another token.
        """
        with self.manager.lock:
            if not self.needs_resume:
                raise LocalProtocolError("nothing remains to be requested now; see needs_resume", room=self.room)
            if sent_tokens != self.transferred_tokens:
                raise LocalProtocolError(
                    f"resume at token {self.transferred_tokens}, not at {sent_tokens}", room=self.room
                )
            return self.manager.resume(self, allocation)

    def poll(self) -> KVPoll:
        with self.manager.lock:
            if self._begun and not self.machine.over:
                self.manager.check()
            return self.machine.status

    def wait(self, timeout: float) -> None:
        """Blocks the calling thread until everything has arrived; see :func:`embferry.transfer.waiting.wait`."""
        wait(self, timeout)

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer. The encode side runs into its time-out, because this wire has no message to tell it."""
        with self.manager.lock:
            if self._begun:
                self.manager.fail(self, error or Aborted("aborted by the language side"))

    def clear(self) -> None:
        """Ends the transfer if it goes on, and drops the arrays."""
        self.abort()
        with self.manager.lock:
            self.gathered = {}

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self.machine.error

    # What has arrived

    @property
    def total_embedding_length(self) -> int:
        """Tokens of the whole embedding; -1 while it is not known."""
        return self.machine.total_tokens

    @property
    def transferred_tokens(self) -> int:
        """Number of leading tokens that have arrived."""
        return self.machine.transferred_tokens

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain that have not been requested."""
        return self.machine.needs_resume

    @property
    def transfers(self) -> int:
        """Number of transfers so far: one initial, the others resumed."""
        return self.machine.rounds

    def buffered_chunks(self) -> Arrays | None:
        """Returns what has arrived, field name to uint8 [transferred_tokens, bytes a token], or None."""
        with self.manager.lock:
            tokens = self.transferred_tokens
            return {name: array[:tokens] for name, array in self.gathered.items()} or None

    def arrays(self) -> Arrays:
        """Returns the fields, uint8 [total tokens, bytes a token]; rows below ``transferred_tokens`` are final.

        Raises:
            LocalProtocolError: Nothing has arrived yet.
        """
        with self.manager.lock:
            if not self.gathered:
                raise LocalProtocolError("nothing has arrived yet", room=self.room)
            return self.gathered

    def _state(self) -> tuple[object, ...]:
        return self.machine.status, self.machine.transferred_tokens
