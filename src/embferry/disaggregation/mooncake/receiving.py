"""The language side of the origin's wire: asks, hears, gathers what has arrived, asks for the rest."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed
from embferry.protocol.errors import (
    Aborted,
    EmbeddingTransferError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings

from ..wire.frames import EmbeddingArgsRegisterInfo, TransferEmbeddingInfo, write
from ..wire.reception import Dropped, Round
from ..wire.statuses import read_status
from .directory import EncodeSide, Target
from .manager import MooncakeEmbeddingManager, OpenEngine
from .marks import Marks
from .receiver import MooncakeEmbeddingReceiver
from .registration import Landing, OriginBuffers
from .settings import OriginSettings

log = logging.getLogger(__name__)

MAX_PAST = 64  # closed landings whose addresses are not used again yet
MAX_REGISTERED = 4096  # (rank, session) pairs that are remembered as told


class LanguageManager(MooncakeEmbeddingManager):
    """Owns one pool of blocks and every transfer into it from senders of the origin, for one language rank.

    Rooms that bring no blocks of their own are served in the order in which they ask, and hold none while they wait.

    :param geometry: layout (:func:`~.settings.origin_layout`), number of blocks and block size of the pool.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        settings: OriginSettings | None = None,
        transfer: TransferSettings | None = None,
        open_engine: OpenEngine | None = None,
    ) -> None:
        super().__init__("embferry-origin-receive", geometry, settings, transfer, open_engine)
        self.buffers = OriginBuffers(geometry)
        self.allocator = ReqToMetadataBlockAllocator(geometry.num_blocks, geometry.block_size)
        self._landing: Landing | None = None
        self._tainted: list[Landing] = []
        self._past: deque[Landing] = deque()  # closed
        self._receivers: dict[int, MooncakeEmbeddingReceiver] = {}
        self._waiting: deque[MooncakeEmbeddingReceiver] = deque()
        self._sides: dict[str, EncodeSide] = {}
        self._registered: dict[tuple[str, int, str], str] = {}  # (host, port, session id): bootstrap address
        self._start()

    def open(self, room: int, bootstrap_addr: str) -> MooncakeEmbeddingReceiver:
        """The receiving end of ``room``. Call its ``init()`` next.

        :param bootstrap_addr: of the encode side that serves it, ``host:port`` or a URL.
        """
        return MooncakeEmbeddingReceiver(self, room, bootstrap_addr)

    def allocate(self, tokens: int, room: int) -> MetadataAllocation | None:
        """Blocks for ``init()`` or ``resume_transfer()`` of that room, or None when not so many are free."""
        with self.lock:
            return self.allocator.alloc(tokens, room)

    # The ends' side; the lock is held

    def check_allocation(self, allocation: MetadataAllocation, room: int) -> None:
        """:raises LocalProtocolError: it is not of this pool, or not this room's."""
        if allocation.block_size != self.geometry.block_size or not allocation.blocks:
            raise LocalProtocolError("an allocation is what manager.allocate returned", room=room)
        if not set(allocation.blocks) <= set(self._held(room)):
            raise LocalProtocolError("these blocks are not held by this room; see manager.allocate", room=room)

    def begin(self, receiver: MooncakeEmbeddingReceiver) -> None:
        """Looks for the encode side of a room.

        :raises LocalProtocolError: the room is in use, or the bootstrap address cannot be one.
        :raises TransportError: the engine cannot start.
        """
        self.check()
        room, address = receiver.room, receiver.bootstrap_addr
        if room in self._receivers:
            raise LocalProtocolError("the room is in use; draw another", room=room)
        side = self._sides.get(address)
        if side is None:
            miss, lost = partial(self._side_missed, address), partial(self._side_lost, address)
            side = self._sides[address] = EncodeSide(
                address, self.settings, lambda: self.call(miss), lambda: self.call(lost)
            )
        if self._landing is None:  # not needed yet, but the caller can still be told if there is none to be had
            self._landing = Landing(self.buffers, self.open_engine)
        self._receivers[room] = receiver
        deadline = self.now() + self.transfer.bootstrap_timeout
        side.find(room, deadline, lambda found: self.call(partial(self._found, receiver, found)))

    def land(self, room: int) -> Landing:
        """Where the tokens of a room land that is about to ask.

        :raises TransportError: the engine cannot start.
        """
        if self._landing is None:
            self._landing = Landing(self.buffers, self.open_engine)
        self._landing.rooms.add(room)
        return self._landing

    def wait_for_blocks(self, receiver: MooncakeEmbeddingReceiver) -> None:
        self._waiting.append(receiver)
        self.wake()

    def ask(self, receiver: MooncakeEmbeddingReceiver, asked: Round) -> None:
        """Sends the request for a round, and before the first to that rank, where our buffers are."""
        target, landing, room = receiver.target, receiver.landing, receiver.room
        assert target is not None
        assert landing is not None
        receiver.marks = Marks(self.buffers.data, self.buffers.aux, asked)
        here = (self.settings.reached_at, self.port, landing.session_id)
        known = (target.host, target.port, landing.session_id)
        if known not in self._registered:
            if len(self._registered) >= MAX_REGISTERED:
                del self._registered[next(iter(self._registered))]
            self._registered[known] = receiver.bootstrap_addr
            self._tell(target, EmbeddingArgsRegisterInfo("None", *here, landing.pointers))
        self._tell(
            target,
            TransferEmbeddingInfo(
                room, *here, asked.blocks, target.required_dst_info_num, asked.sent_tokens, asked.allocated_tokens
            ),
        )
        if asked.sent_tokens:
            log.info(
                "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d",
                *(room, asked.sent_tokens, asked.allocated_tokens),
            )
        self.wake()

    def ended(self, receiver: MooncakeEmbeddingReceiver) -> None:
        """The room is over, one way or another."""
        if self._receivers.pop(receiver.room, None) is None:
            return
        landing, room = receiver.landing, receiver.room
        asked = receiver.reception.round
        if landing is not None:
            landing.rooms.discard(room)
            if asked is not None:
                landing.quarantine(room, asked.blocks)
                self.allocator.quarantine(asked.blocks, room)
            if landing.tainted and landing is self._landing:
                self._landing = None
                self._tainted.append(landing)
        self.allocator.free(self._held(room), room)
        self._close_tainted()
        self.wake()  # others wait for these blocks

    # The thread's side

    def _take(self, frames: Sequence[bytes], now: float) -> None:
        try:
            said = read_status(frames)
        except RemoteProtocolError as error:
            log.warning("refused a status (room %s): %s", error.room, error.detail)
            return
        receiver = self._receivers.get(said.room)
        if receiver is None:
            log.warning("refused a status (room %d): the room is unknown, or over", said.room)
            return
        outcome = receiver.reception.heard(said.status, receiver.marks, now)
        if isinstance(outcome, Dropped):
            log.warning("refused a status (room %d): %s", said.room, outcome.reason)
        elif outcome is not None:
            receiver.arrived(outcome)
        receiver.changed()

    def _advance(self, now: float) -> float | None:
        for receiver in list(self._receivers.values()):
            receiver.reception.tick(now)
            if receiver.reception.over:
                receiver.changed()
        self._serve()
        deadlines = (receiver.reception.deadline for receiver in self._receivers.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _serve(self) -> None:
        """Gives blocks to those that wait for some, in their order."""
        while self._waiting and self.allocator.available:
            receiver = self._waiting.popleft()
            if receiver.reception.over:
                continue
            remaining = receiver.reception.total_tokens - receiver.transferred_tokens
            tokens = remaining if receiver.reception.rounds else self.transfer.default_allocate_tokens
            count = min(blocks_needed(tokens, self.geometry.block_size), self.allocator.available)
            allocation = self.allocator.alloc_blocks(count, receiver.room)
            assert allocation is not None
            receiver.grant(allocation)

    def _found(self, receiver: MooncakeEmbeddingReceiver, found: Target | EmbeddingTransferError) -> None:
        if receiver.reception.over:
            return
        if isinstance(found, EmbeddingTransferError):
            receiver.abort(found)
        else:
            receiver.routed(found)

    def _side_missed(self, address: str) -> None:
        """It may have been restarted, and know nothing of us."""
        self._registered = {known: side for known, side in self._registered.items() if side != address}

    def _side_lost(self, address: str) -> None:
        self._side_missed(address)
        for receiver in [r for r in self._receivers.values() if r.bootstrap_addr == address]:
            receiver.abort(PeerGone(f"the encode side at {address} does not answer any more", room=receiver.room))

    def _tell(self, target: Target, message: EmbeddingArgsRegisterInfo | TransferEmbeddingInfo) -> None:
        self.push(target.host, target.port, write(message, self.wire))

    def _held(self, room: int) -> list[int]:
        blocks = self.allocator.holders().get(room, ())
        return [block for block in blocks if not self.allocator.is_quarantined(block)]

    def _close_tainted(self) -> None:
        for landing in [landing for landing in self._tainted if not landing.rooms]:
            self._tainted.remove(landing)
            landing.close()
            for room, blocks in landing.quarantined:
                self.allocator.release_quarantined(blocks, room)
            self._past.append(landing)
            if len(self._past) > MAX_PAST:
                self._past.popleft().release()

    def _collapsed(self) -> None:
        for receiver in self._receivers.values():
            receiver.notify()

    def _shut_down(self) -> None:
        for side in list(self._sides.values()):
            side.stop()
        with self.lock:
            for receiver in list(self._receivers.values()):
                receiver.abort(Aborted("the language side is shutting down", room=receiver.room, retryable=True))
            landings = [*self._tainted, *([self._landing] if self._landing else [])]
            self._tainted, self._landing = [], None
            for landing in landings:
                landing.close()
            self._past.extend(landings)

    def _closed(self) -> None:
        for landing in self._past:
            landing.release()
        self.buffers.close()
