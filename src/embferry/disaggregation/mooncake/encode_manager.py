"""The encode side of the origin's wire: executes what :mod:`embferry.disaggregation.wire.sender_rooms` commands."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from typing import ClassVar, Unpack

import numpy as np
import numpy.typing as npt

from embferry.discovery.bootstrap_client import BootstrapClient, RankKeeper
from embferry.discovery.leases import Rank
from embferry.memory.buffers import AUX_WIDTH
from embferry.protocol.errors import EmbeddingTransferError, LocalProtocolError
from embferry.protocol.layout import Geometry, Layout
from embferry.transfer.control.endpoint import tcp_endpoint
from embferry.transfer.fields import Fields, check_fields

from ..wire.messages import REGISTER, EmbeddingStatus, write_status
from ..wire.sender_rooms import (
    Command,
    Ended,
    RefusedInitError,
    Registered,
    Report,
    SenderRoom,
    SenderRooms,
    WriteBlocks,
)
from .buffer_layout import block_writes
from .manager import MooncakeEmbeddingManager, Options, OriginHandle
from .session_engines import SessionEngines

log = logging.getLogger(__name__)


class EncodeManager(MooncakeEmbeddingManager):
    """Serves every room of one encode rank to receivers of the origin.

    Args:
        geometry: The language side's pool, which is not on the wire.
        bootstrap_url: Where this rank registers itself (``PUT /route``), such as ``http://10.0.0.5:8998``. None if
            receivers are given its address in another way.
        options: ``settings``, ``transfer`` and ``open_engine``, as in :class:`MooncakeEmbeddingManager`.
    """

    side: ClassVar[str] = "encode"

    def __init__(self, geometry: Geometry, *, bootstrap_url: str | None = None, **options: Unpack[Options]) -> None:
        super().__init__("embferry-origin-send", geometry, **options)
        s = self.settings
        self.rooms = SenderRooms(self.wire, self.transfer)
        self.handles: dict[int, MooncakeEmbeddingSender] = {}
        register_sources = s.protocol != "tcp" if s.register_sources is None else s.register_sources
        self._engines = SessionEngines(self.open_engine, register_sources)
        self._registration: RankKeeper | None = None
        if bootstrap_url is not None:
            sizes = {"tp_size": s.tp_size, "dp_size": s.dp_size, "engine_rank": s.engine_rank}
            rank = Rank(rank_ip=s.reached_at, rank_port=self.port, **sizes)
            self._registration = RankKeeper(
                BootstrapClient(bootstrap_url, must_prove=False), rank, s.heartbeat_interval
            )
            self._registration.start()
        self.start()

    @property
    def endpoint(self) -> str:
        """Endpoint for control messages, as peers reach it."""
        return tcp_endpoint(self.settings.reached_at, self.port)

    @property
    def layout(self) -> Layout:
        """The fields of a token."""
        return self.geometry.layout

    def open(self, room: int) -> MooncakeEmbeddingSender:
        """Returns the sending end of ``room``. Call its ``init()`` next."""
        return MooncakeEmbeddingSender(self, SenderRoom(room))

    # The driver

    def _receive(self, frames: Sequence[bytes], now: float) -> None:
        try:
            self.execute(self.rooms.receive(frames, now))
        except RefusedInitError as refused:
            self.execute([refused.report])
            raise
        if frames[0] != REGISTER and (handle := self.handles.get(int(frames[0]))) is not None:
            handle.report()

    def _expire(self, now: float) -> float | None:
        self.execute(self.rooms.tick(now))
        return self.rooms.next_timeout()

    def _end_transfers(self) -> None:
        if self._registration is not None:
            self._registration.stop()
        super()._end_transfers()
        self._engines.close()  # without the lock: it joins threads whose last calls are queued for the driver

    def execute(self, commands: Iterable[Command]) -> None:
        """Executes commands in order. The lock is held."""
        for command in commands:
            match command:
                case Registered(session, _):
                    log.info("session %s is registered", session)
                    self._engines.forget(session)
                case WriteBlocks():
                    self._write(command)
                case Report(room, endpoint, port, status):
                    self.push(endpoint, port, write_status(EmbeddingStatus(room, status)))
                case Ended(room, error):
                    if error is not None:
                        log.warning("room %d: failed: %s", room, error.detail, extra={"room": room})
                    if room in self.handles:
                        self.handles.pop(room).release()

    def _write(self, command: WriteBlocks) -> None:
        sender = self.handles[command.room]
        if not command.aux:
            extra = {"room": command.room}
            log.debug("room %d: resumed transfer from token %d on", command.room, command.sent_tokens, extra=extra)
        planes = self.settings.mrope_planes
        runs, sources = block_writes(self.geometry, command, sender.fields, sender.aux, planes=planes)
        self._engines.write(command.session, runs, sources, partial(self._on_written, command.room, command.session))

    def _on_written(self, room: int, session: str, failure: str) -> None:
        """Queues the end of a write for the driver. Any thread, without a lock."""
        self.call(lambda: self.execute(self.rooms.written(room, session, self.now(), failure)))


class MooncakeEmbeddingSender(OriginHandle):
    """The sending end of one room, for receivers of the origin. Made by :meth:`EncodeManager.open`.

    Attributes:
        fields: The embedding while it may be read.
        aux: ``aux_datas`` of the embedding, int32 [16].
    """

    manager: EncodeManager
    machine: SenderRoom

    def __init__(self, manager: EncodeManager, machine: SenderRoom) -> None:
        super().__init__(manager, machine)
        self.fields: Fields = {}
        self.aux: npt.NDArray[np.int32] = np.zeros(AUX_WIDTH, np.int32)
        self._announced: int | None = None

    def init(self, total_tokens: int | None = None, content_digest: bytes = b"", aux: Sequence[int] = ()) -> None:
        """Tells the manager that it has to serve this room. The receiver may have asked for it before.

        Args:
            total_tokens: Length of the embedding if it is known. It is sent with the embedding, not before.
            content_digest: Ignored, since this wire does not carry it; callers for both wires pass it.
            aux: Up to 16 int32 for ``aux_datas`` of the language side. [0] is set to the length, [1] is the mrope
                position delta.

        Raises:
            LocalProtocolError: The room is in use, or ``aux`` does not fit.
            CapacityError: There are too many rooms.
        """
        try:
            self.aux[: len(aux)] = aux
        except (ValueError, OverflowError) as error:
            raise LocalProtocolError(f"aux has up to {AUX_WIDTH} int32: {error}", room=self.room) from None
        with self.manager.lock:
            if self.machine.opened or self.machine.over:
                raise LocalProtocolError("init() is called once; open the room again instead", room=self.room)
            self.manager.check()
            self.machine = self.manager.rooms.open(self.room, self.manager.now())
            self.manager.handles[self.room] = self
            self._announced = total_tokens
        self.manager.wake()

    def send_embedding(self, fields: Fields, ready_tokens: int | None = None) -> None:
        """Sends the embedding from where it lies: do not change it before :attr:`source_released`.

        Args:
            fields: Every field of the layout, uint8 [total tokens, bytes a token], contiguous, in host memory.
            ready_tokens: Number of tokens that are produced. Nothing is sent before all are (None), because this wire
                states the length with the first block.

        Raises:
            LocalProtocolError: A field is missing or does not fit, or the embedding was given before, or ``init()``
                was not called.
        """
        if not all(isinstance(array, np.ndarray) for array in fields.values()):
            raise LocalProtocolError("the origin's wire sends from host memory; copy the fields first", room=self.room)
        total = len(fields.get("input_embeddings", ()))
        check_fields(self.manager.geometry.layout, fields, total, self.room)
        if self._announced not in (None, total):
            raise LocalProtocolError(f"{total} tokens, announced were {self._announced}", room=self.room)
        if total > self.manager.settings.max_total_tokens:
            raise LocalProtocolError(f"{total} tokens are more than max_total_tokens", room=self.room)
        if ready_tokens is not None and ready_tokens < total:
            return
        with self.manager.lock:
            if self.machine.over:
                return  # aborted meanwhile
            self.manager.check()
            commands = self.manager.rooms.ready(self.room, total, self.manager.now())
            self.fields = fields
            self.aux[0] = total
            self.manager.execute(commands)
        self.manager.wake()

    send = send_embedding

    def _fail(self, error: EmbeddingTransferError) -> None:
        """Ends the transfer as soon as no write of it is in flight. The receiver hears ``Failed`` without a reason."""
        if self.machine.opened:
            self.manager.execute(self.manager.rooms.abort(self.room, error))
            self.manager.wake()
        else:
            self.machine.fail(error)
            self.report()

    @property
    def source_released(self) -> bool:
        """Whether the arrays given to :meth:`send_embedding` are not read any more."""
        return self.machine.over

    @property
    def sent_bytes(self) -> int:
        """Bytes written so far, to all destination ranks."""
        machine = self.machine
        return machine.sent_tokens * self.manager.layout.token_bytes * len(machine.members)

    def release(self) -> None:
        """Drops the embedding and reports the end of the room. Called by the manager, with its lock held."""
        self.fields = {}
        self.report()
