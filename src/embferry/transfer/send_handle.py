"""The sending end of one room, as its users see it."""

from __future__ import annotations

from typing import Protocol

from embferry.protocol.errors import Aborted, EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Layout
from embferry.protocol.sender import Sender
from embferry.protocol.states import KVPoll

from .checksums import Checksums
from .fields import check_fields
from .handle import Handle, Host
from .staging import Source


class SendHost(Host, Protocol):
    """The manager, as far as a sending end needs it."""

    layout: Layout

    def begin(self, sender: EmbeddingSender) -> None:
        """Starts the writes of tokens that have just become ready. The lock is held."""

    def touch(self, sender: EmbeddingSender) -> None:
        """Queues the sender to be processed by the driver thread."""


class EmbeddingSender(Handle):
    """The sending end of one room. Made by :meth:`~.send_manager.SendManager.open`. Every method returns at once.

    Attributes:
        peers: Session of each receiver to its address on the control plane.
        source: The fields that are sent; empty before :meth:`send_embedding` and after the release.
        checksums: Checksums taken in advance, if any.
        sent_bytes: Bytes written so far, repeated chunks included.
    """

    def __init__(self, manager: SendHost, machine: Sender) -> None:
        super().__init__(machine.room, manager)
        self.manager = manager
        self.peers: dict[int, object] = {}
        self.source: Source = {}
        self.checksums: Checksums | None = None
        self.sent_bytes = 0
        self._machine = machine
        self._reported = (KVPoll.Bootstrapping, False)

    @property
    def machine(self) -> Sender:
        return self._machine

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self.machine.error

    @property
    def has_ended(self) -> bool:
        return super().has_ended and self.source_released

    def init(self, total_tokens: int, content_digest: bytes, aux: tuple[int, ...] = ()) -> None:
        """Announces length and content. Call it as soon as they are known, before the encoder runs.

        Args:
            total_tokens: Tokens of the whole embedding.
            content_digest: 1 to 64 bytes. Equal digests promise equal bytes.
            aux: Up to 16 int32 for the language side's ``aux_datas``.

        Raises:
            LocalProtocolError: Announced differently before, or out of bounds.
        """
        if not 1 <= len(content_digest) <= 64:
            raise LocalProtocolError("a content digest has 1 to 64 bytes", room=self.room)
        with self.manager.lock:
            self.machine.announce(total_tokens, content_digest, aux)
        self.manager.touch(self)

    def send_embedding(
        self, fields: Source, ready_tokens: int | None = None, *, checksums: Checksums | None = None
    ) -> None:
        """Sends the embedding. It is read in place: do not change it before :attr:`source_released`.

        Args:
            fields: Every field of the layout, uint8 [total_tokens, bytes a token]: contiguous, or in device memory.
            ready_tokens: Tokens produced so far; None: all. Call again with the same arrays for more.
            checksums: Checksums of these fields taken in advance. Missing ones are taken while chunks are written.

        Raises:
            LocalProtocolError: A field is missing, not contiguous, or does not fit what was announced.
        """
        with self.manager.lock:
            total = self.machine.total_tokens
            check_fields(self.manager.layout, fields, total, self.room)
            if not self.machine.source_released:
                self.source, self.checksums = fields, checksums or self.checksums
                self.machine.produce(total if ready_tokens is None else ready_tokens)
                self.manager.begin(self)

    def poll(self) -> KVPoll:
        """Returns where the transfer stands.

        Raises:
            LocalProtocolError: The manager is closed or has failed.
        """
        with self.manager.lock:
            self.manager.check()
            return self.machine.poll()

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer and tells the receiver why. Does nothing if it has ended already."""
        with self.manager.lock:
            self.machine.abort(error or Aborted("aborted by the encode side", room=self.room), self.manager.now())
        self.manager.touch(self)

    def clear(self) -> None:
        """The caller needs the room no longer. It is forgotten once no receiver can ask for it any more."""
        self.abort()

    @property
    def source_released(self) -> bool:
        """Whether the arrays given to :meth:`send_embedding` are no longer read."""
        return self.machine.source_released

    def release(self) -> None:
        """Drops the references to the embedding. Called by the manager, with its lock held."""
        self.source, self.checksums = {}, None

    def _state(self) -> tuple[object, ...]:
        return self.machine.poll(), self.machine.source_released
