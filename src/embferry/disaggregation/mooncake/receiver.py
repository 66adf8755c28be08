"""The receiving end of one room."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation, blocks_needed
from embferry.memory.buffers import AUX_WIDTH
from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError, TransportError
from embferry.protocol.states import KVPoll

from ..wire.reception import Arrived, Reception
from .ends import End
from .marks import Marks
from .rows import gather

if TYPE_CHECKING:
    from .directory import Target
    from .receiving import LanguageManager
    from .registration import Landing

log = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[np.uint8]]


class MooncakeEmbeddingReceiver(End):
    """The receiving end of one room, for senders of the origin. Every method but ``wait()`` returns at once.

    :param bootstrap_addr: of the encode side, ``host:port`` or a URL.
    """

    manager: LanguageManager

    def __init__(self, manager: LanguageManager, bootstrap_room: int, bootstrap_addr: str) -> None:
        super().__init__(manager, bootstrap_room)
        self.bootstrap_addr = bootstrap_addr if "://" in bootstrap_addr else f"http://{bootstrap_addr}"
        self.target: Target | None = None
        self.landing: Landing | None = None
        """Where its tokens land, once it has asked."""
        self.marks: Marks | None = None
        self.current_allocation: MetadataAllocation | None = None
        """The blocks of the latest request."""
        self.aux: npt.NDArray[np.int32] = np.zeros(AUX_WIDTH, np.int32)
        """``aux_datas`` of the embedding, once tokens have arrived: [0] its length, [1] its mrope position delta."""
        self._reception: Reception | None = None
        self._granted: MetadataAllocation | None = None
        self._automatic = False
        self._arrays: Arrays = {}
        self._reported: tuple[KVPoll, int] = (KVPoll.Bootstrapping, 0)

    @property
    def reception(self) -> Reception:
        if self._reception is None:
            raise LocalProtocolError("call init() first", room=self.room)
        return self._reception

    def init(self, allocation: MetadataAllocation | None = None) -> None:
        """Asks for the embedding.

        :param allocation: blocks for the initial transfer, from ``manager.allocate(tokens, room)``; each further part
            is then asked for with :meth:`resume_transfer`. If None, this transfer and its resumed ones are given blocks
            in turn, without further calls. Ranks that share a room ask for the same number of blocks: give them.
        :raises LocalProtocolError: called twice, or the room is in use.
        :raises TransportError: the engine cannot start.
        """
        with self.manager.lock:
            if self._reception is not None:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            if allocation is not None:
                self.manager.check_allocation(allocation, self.room)
            self.manager.begin(self)
            m = self.manager
            self._reception = Reception(self.room, m.wire, m.transfer, m.settings.max_total_tokens, m.now())
            self._automatic = allocation is None
            self._granted = allocation
        self.manager.wake()

    def resume_transfer(self, allocation: MetadataAllocation | None = None, sent_tokens: int = 0) -> int:
        """Resumes the transfer for remaining data, from token ``sent_tokens`` on.

        :param allocation: blocks from ``manager.allocate``; those beyond what remains go back at once. If None, the
            manager gives blocks in turn from now on.
        :param sent_tokens: ``transferred_tokens``.
        :returns: the tokens asked for; 0 if that is left to the manager.
        :raises LocalProtocolError: it does not need it (see :attr:`needs_resume`), or at another token.
        """
        with self.manager.lock:
            if not self.needs_resume:
                raise LocalProtocolError("nothing remains to be asked for now", room=self.room)
            if sent_tokens != self.transferred_tokens:
                raise LocalProtocolError(
                    f"resume at token {self.transferred_tokens}, not at {sent_tokens}", room=self.room
                )
            if allocation is None:
                if not self._automatic:
                    self._automatic = True
                    self.manager.wait_for_blocks(self)
                return 0
            self.manager.check_allocation(allocation, self.room)
            remaining = self.reception.total_tokens - self.transferred_tokens
            needed = blocks_needed(remaining, allocation.block_size)
            self.manager.allocator.free(allocation.blocks[needed:], self.room)
            self._ask(MetadataAllocation(allocation.blocks[:needed], allocation.block_size))
            return min(remaining, allocation.allocated_tokens)

    def poll(self) -> KVPoll:
        with self.manager.lock:
            if self._reception is None:
                return KVPoll.Bootstrapping
            if not self._reception.over:
                self.manager.check()
            return self._reception.status

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer. The encode side is not told: this wire has no word for it; it runs into its time-out."""
        with self.manager.lock:
            if self._reception is not None and not self._reception.over:
                self._reception.fail(error or Aborted("aborted by the language side"))
                self.changed()

    def clear(self) -> None:
        """The caller is through with it: its arrays are dropped, its blocks go back to the pool."""
        self.abort()
        with self.manager.lock:
            self._arrays = {}

    # What has arrived

    @property
    def total_embedding_length(self) -> int:
        """Tokens of the whole embedding; -1 while it is not known."""
        return -1 if self._reception is None else self._reception.total_tokens

    @property
    def transferred_tokens(self) -> int:
        """Tokens from the first on that are here."""
        return 0 if self._reception is None else self._reception.transferred_tokens

    @property
    def needs_resume(self) -> bool:
        """Whether tokens remain that have not been asked for."""
        return self._reception is not None and self._reception.needs_resume

    @property
    def transfers(self) -> int:
        """How many transfers so far: one initial, the others resumed."""
        return 0 if self._reception is None else self._reception.rounds

    def buffered_chunks(self) -> Arrays | None:
        """What has been gathered so far, field name to uint8 [transferred_tokens, bytes a token], or None."""
        with self.manager.lock:
            tokens = self.transferred_tokens
            return {name: array[:tokens] for name, array in self._arrays.items()} or None

    def arrays(self) -> Arrays:
        """The gathered fields, uint8 [total tokens, bytes a token]: rows below ``transferred_tokens`` are final.

        :raises LocalProtocolError: nothing has arrived yet.
        """
        with self.manager.lock:
            if not self._arrays:
                raise LocalProtocolError("nothing has arrived yet", room=self.room)
            return self._arrays

    # The manager's side; its lock is held

    def routed(self, target: Target) -> None:
        self.target = target
        self.reception.found()
        if self._granted is not None:
            allocation, self._granted = self._granted, None
            self._ask(allocation)
        else:
            self.manager.wait_for_blocks(self)

    def grant(self, allocation: MetadataAllocation) -> None:
        self._ask(allocation)

    def arrived(self, arrived: Arrived) -> None:
        """Takes tokens out of their blocks, which go back to the pool: nothing of them is on its way."""
        manager, blocks = self.manager, arrived.round.blocks
        if not self._arrays:
            total, fields = self.reception.total_tokens, manager.geometry.layout.fields
            self._arrays = {field.name: np.empty((total, field.token_bytes), np.uint8) for field in fields}
            self.aux = manager.buffers.aux[blocks[0]].copy()
        gather(
            manager.buffers.data,
            blocks,
            arrived.tokens,
            self._arrays,
            arrived.round.sent_tokens,
            planes=manager.settings.mrope_planes,
        )
        self.marks = None
        manager.allocator.free(blocks, self.room)
        if self.reception.needs_resume:
            log.info(
                "room %d: needs resume for remaining data: %d of %d tokens transferred",
                *(self.room, self.transferred_tokens, self.total_embedding_length),
            )
            if self._automatic:
                manager.wait_for_blocks(self)
        elif self.transfers > 1:
            log.info("room %d: completed with resumed transfer: %d transfers", self.room, self.transfers)

    def changed(self) -> None:
        """Looks whether the room is over, and tells whoever wants to know."""
        if self.reception.over:
            self._error = self.reception.error
            self.manager.ended(self)
            if self._error is not None:
                self._arrays = {}
        state = (self.reception.status, self.transferred_tokens)
        if state != self._reported:
            self._reported = state
            self.notify()

    def _ask(self, allocation: MetadataAllocation) -> None:
        if self.landing is None:
            try:
                self.landing = self.manager.land(self.room)
            except TransportError as error:
                self.abort(error)
                return
        self.current_allocation = allocation
        self.manager.ask(self, self.reception.ask(allocation.blocks, self.manager.now()))
        self.changed()
