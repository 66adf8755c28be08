"""The sending end of one room, as its users see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from embferry.protocol.arguments import as_error, as_integer
from embferry.protocol.errors import Aborted, EmbeddingTransferError
from embferry.protocol.layout import Layout
from embferry.protocol.sender import Sender
from embferry.protocol.states import KVPoll

from .checksums import Checksums
from .fields import check_fields
from .handle import ENDED, Handle, Host
from .send_record import SendRecord
from .staging import Source


class SendHost(Host, Protocol):
    """The manager, as far as a sending end needs it."""

    layout: Layout

    def begin(self, record: SendRecord) -> None: ...

    def guard(self, record: SendRecord, call: Callable[..., object], *arguments: object) -> None: ...

    def touch(self, record: SendRecord) -> None: ...


class EmbeddingSender(Handle):
    """The sending end of one room. Made by :meth:`~.send_manager.SendManager.open`.

    Every method returns at once, and may be called from any thread.
    """

    def __init__(self, manager: SendHost, record: SendRecord) -> None:
        super().__init__(record.room, manager)
        self.manager = manager
        self._record = record
        self._reported = (KVPoll.Bootstrapping, False)
        record.end = self

    @property
    def machine(self) -> Sender:
        """The state machine, for reading."""
        return self._record.machine

    @property
    def error(self) -> EmbeddingTransferError | None:
        return self._record.error

    @property
    def has_ended(self) -> bool:
        return super().has_ended and self.source_released

    def init(self, total_tokens: int, content_digest: bytes, aux: Sequence[int] = ()) -> None:
        """Announces length and content. Call it as soon as they are known, before the encoder runs.

        Args:
            total_tokens: Tokens of the whole embedding.
            content_digest: 1 to 64 bytes. Equal digests promise equal bytes.
            aux: Up to 16 int32 for the language side's ``aux_datas``.

        Raises:
            LocalProtocolError: Announced differently before, or out of bounds.
        """
        with self.manager.lock:
            self.machine.announce(total_tokens, content_digest, aux)
            if self.machine.current is not None:  # the receiver is told at once
                self.manager.touch(self._record)

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
            if ready_tokens is not None:
                ready_tokens = as_integer("ready_tokens", ready_tokens, 0, max(total, 0), room=self.room)
            check_fields(self.manager.layout, fields, total, self.room)
            if self._record.poll() in ENDED:
                return
            self.machine.produce(total if ready_tokens is None else ready_tokens)
            self._record.source = dict(fields)
            if checksums is not None:
                self._record.checksums = checksums
            self.manager.begin(self._record)

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
        """Ends the transfer and tells the receiver why. Does nothing if it has ended already."""
        reason = None if error is None else as_error(error, room=self.room)
        with self.manager.lock:
            if self._record.poll() in ENDED:
                return
            reason = reason or Aborted("aborted by the encode side", room=self.room)
            self._record.failure = self._record.failure or reason
            self.manager.guard(self._record, self.machine.abort, reason, self.manager.now())
        self.manager.touch(self._record)

    def clear(self) -> None:
        """Ends the transfer if it still runs. The room is forgotten once no receiver can ask for it any more."""
        self.abort()

    @property
    def source_released(self) -> bool:
        """Whether the arrays given to :meth:`send_embedding` are no longer read."""
        return self._record.is_released

    @property
    def sent_bytes(self) -> int:
        """Bytes written so far, repeated chunks included."""
        return self._record.sent_bytes

    def _state(self) -> tuple[object, ...]:
        return self._record.poll(), self._record.is_released
