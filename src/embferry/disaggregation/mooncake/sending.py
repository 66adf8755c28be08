"""The encode side of the origin's wire: executes what :mod:`embferry.disaggregation.wire.rooms` commands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

from embferry.discovery.bootstrap_client import BootstrapClient
from embferry.discovery.leases import Rank
from embferry.memory.buffers import AUX_WIDTH
from embferry.protocol.errors import (
    Aborted,
    EmbeddingTransferError,
    LeaseExpired,
    LocalProtocolError,
    TransportError,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll

from ..wire.commands import Command, Ended, Refused, Registered, Report, WriteBlocks
from ..wire.rooms import OriginRooms
from ..wire.statuses import EmbeddingStatus, write_status
from .directory import RouteKeeper
from .ends import ENDED, End
from .engines import Engines
from .manager import MooncakeEmbeddingManager, OpenEngine
from .rows import Rows, check_rows, writes
from .settings import OriginSettings

log = logging.getLogger(__name__)


class EncodeManager(MooncakeEmbeddingManager):
    """Serves every room of one encode rank to receivers of the origin.

    :param geometry: of the language side's pool: it is not on the wire.
    :param bootstrap_url: where this rank registers itself (``PUT /route``), such as ``http://10.0.0.5:8998``; None:
        nowhere, receivers are told its address in another way.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        bootstrap_url: str | None = None,
        settings: OriginSettings | None = None,
        transfer: TransferSettings | None = None,
        open_engine: OpenEngine | None = None,
    ) -> None:
        super().__init__("embferry-origin-send", geometry, settings, transfer, open_engine)
        self._rooms = OriginRooms(self.wire, self.transfer)
        self._transports = Engines(self.open_engine, self.settings.sources_are_registered)
        self._senders: dict[int, MooncakeEmbeddingSender] = {}
        self._keeper = None if bootstrap_url is None else self._registered_at(bootstrap_url)
        self._start()

    def open(self, room: int) -> MooncakeEmbeddingSender:
        """The sending end of ``room``. Call its ``init()`` next."""
        return MooncakeEmbeddingSender(self, room)

    # The ends' side; the lock is held

    def begin(self, sender: MooncakeEmbeddingSender) -> None:
        self.check()
        self._execute(self._rooms.open(sender.room, self.now()))
        self._senders[sender.room] = sender

    def ready(self, sender: MooncakeEmbeddingSender, total_tokens: int) -> None:
        self.check()
        self._execute(self._rooms.ready(sender.room, total_tokens, self.now()))
        self.wake()

    def abort(self, room: int, reason: str) -> None:
        self._execute(self._rooms.abort(room, reason))
        self.wake()

    def status(self, room: int) -> KVPoll:
        return self._rooms.poll(room) or KVPoll.Bootstrapping

    # The thread's side

    def _take(self, frames: Sequence[bytes], now: float) -> None:
        self._execute(self._rooms.receive(frames, now))

    def _advance(self, now: float) -> float | None:
        self._execute(self._rooms.tick(now), LeaseExpired)
        return self._rooms.next_timeout()

    def _collapsed(self) -> None:
        for sender in self._senders.values():
            sender.notify()

    def _shut_down(self) -> None:
        if self._keeper is not None:
            self._keeper.stop()
        with self.lock:
            for sender in list(self._senders.values()):
                sender.abort(Aborted("the encode side is shutting down", room=sender.room, retryable=True))
        self._transports.close()  # without the lock: it joins threads; what they report, the thread takes in at its end

    def _execute(self, commands: Iterable[Command], why: type[EmbeddingTransferError] = TransportError) -> None:
        """:param why: what a failure that shows in ``commands`` is."""
        for command in commands:
            match command:
                case Registered(session, _):
                    log.info("session %s is registered", session)
                    self._transports.forget(session)
                case WriteBlocks():
                    self._write(command)
                case Report(room, endpoint, port, status):
                    self.push(endpoint, port, write_status(EmbeddingStatus(room, status, self.settings.sender_rank)))
                case Ended(room, status, reason):
                    self._ended(room, status, reason, why)
                case Refused(reason, room, session):
                    log.warning("refused a message (room %s, session %s): %s", room, session, reason)

    def _write(self, command: WriteBlocks) -> None:
        sender = self._senders[command.room]
        if not command.aux:
            log.debug("room %d: resumed transfer from token %d on", command.room, command.sent_tokens)
        slices, sources = writes(
            self.geometry,
            sender.rows,
            command.pointers,
            command.blocks,
            command.sent_tokens,
            command.num_tokens,
            sender.aux if command.aux else None,
            planes=self.settings.mrope_planes,
        )
        over = partial(self._over, command.room, command.session)
        self._transports.write(command.session, slices, sources, over)

    def _over(self, room: int, session: str, failure: str) -> None:
        """On any thread."""
        self.call(lambda: self._execute(self._rooms.written(room, session, self.now(), failure)))

    def _ended(self, room: int, status: KVPoll, reason: str, why: type[EmbeddingTransferError]) -> None:
        sender = self._senders.pop(room, None)
        if reason:
            log.warning("room %d: failed: %s", room, reason)
        if sender is not None:
            sender.end(status, None if status is KVPoll.Success else why(reason, room=room))

    def _registered_at(self, url: str) -> RouteKeeper:
        s = self.settings
        rank = Rank(
            tp_size=s.tp_size, dp_size=s.dp_size, rank_ip=s.reached_at, rank_port=self.port, engine_rank=s.engine_rank
        )
        keeper = RouteKeeper(BootstrapClient(url), rank, s.heartbeat_interval)
        keeper.start()
        return keeper


class MooncakeEmbeddingSender(End):
    """The sending end of one room, for receivers of the origin. Every method but ``wait()`` returns at once."""

    manager: EncodeManager

    def __init__(self, manager: EncodeManager, bootstrap_room: int) -> None:
        super().__init__(manager, bootstrap_room)
        self.rows: Rows = {}
        self.aux: npt.NDArray[np.int32] = np.zeros(AUX_WIDTH, np.int32)
        self._begun = False
        self._announced: int | None = None
        self._ended: KVPoll | None = None

    def init(self, total_tokens: int | None = None, content_digest: bytes = b"", aux: tuple[int, ...] = ()) -> None:
        """There is such a request here; its receiver may have asked before.

        :param total_tokens: if it is known; it is not sent before the embedding is.
        :param content_digest: taken for the sake of callers that have one; this wire does not carry it.
        :param aux: up to 16 int32 for the language side's ``aux_datas``; [0] is set to the length, [1] is the mrope
            position delta.
        :raises LocalProtocolError: the room is in use, or ``aux`` does not fit.
        :raises CapacityError: there are too many rooms.
        """
        try:
            self.aux[: len(aux)] = aux
        except (ValueError, OverflowError) as error:
            raise LocalProtocolError(f"aux has up to {AUX_WIDTH} int32: {error}", room=self.room) from None
        with self.manager.lock:
            if self._begun or self._ended is not None:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            self.manager.begin(self)
            self._begun = True
            self._announced = total_tokens
        self.manager.wake()

    def send_embedding(self, rows: Rows, ready_tokens: int | None = None) -> None:
        """The embedding itself, read in place: do not change it before :attr:`source_released`.

        :param rows: every field of the layout, uint8 [total tokens, bytes a token], contiguous.
        :param ready_tokens: how many are produced so far. Nothing travels before all are (None): this wire says the
            length with the first block.
        :raises LocalProtocolError: a field is missing or does not fit, or this is said twice or before ``init()``.
        """
        total = check_rows(self.manager.geometry, rows, self.room)
        if self._announced not in (None, total):
            raise LocalProtocolError(f"{total} tokens, announced were {self._announced}", room=self.room)
        if total > self.manager.settings.max_total_tokens:
            raise LocalProtocolError(f"{total} tokens are more than max_total_tokens", room=self.room)
        if ready_tokens is not None and ready_tokens < total:
            return
        with self.manager.lock:
            if self._ended is not None:
                return  # aborted meanwhile
            before = self.rows
            self.rows = rows
            self.aux[0] = total
            try:
                self.manager.ready(self, total)
            except LocalProtocolError:
                self.rows = before
                raise

    send = send_embedding

    def poll(self) -> KVPoll:
        with self.manager.lock:
            if self._ended is not None:
                return self._ended
            self.manager.check()
            return self.manager.status(self.room)

    def abort(self, error: EmbeddingTransferError | None = None) -> None:
        """Ends the transfer, once no write of it is under way. The receiver hears ``Failed``, and no reason."""
        with self.manager.lock:
            if self._ended is None:
                self._error = error or Aborted("aborted by the encode side", room=self.room)
                if self._begun:
                    self.manager.abort(self.room, self._error.detail)
                else:
                    self.end(KVPoll.Failed, self._error)

    def clear(self) -> None:
        """The caller is through with it."""
        self.abort()

    @property
    def source_released(self) -> bool:
        """Whether the arrays given to :meth:`send_embedding` are no longer read from, and will not be."""
        return self._ended in ENDED

    def end(self, status: KVPoll, error: EmbeddingTransferError | None) -> None:
        """The manager's: the room is over. The lock is held."""
        self._ended = status
        self._error = (self._error or error) if status is KVPoll.Failed else None
        self.rows = {}
        self.notify()
