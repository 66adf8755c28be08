"""The language side of the origin's wire: requests tokens, gathers what arrives, requests the rest."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

import numpy as np

from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator, blocks_needed
from embferry.protocol.errors import (
    Aborted,
    EmbeddingTransferError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings

from ..wire.messages import EmbeddingArgsRegisterInfo, TransferEmbeddingInfo, read_status, write
from ..wire.receiver_room import Arrived, Dropped, ReceiverRoom
from .buffer_layout import gather
from .encode_ranks import EncodeRank, EncodeSide
from .manager import MooncakeEmbeddingManager
from .pool_mapping import PoolMapping, PoolMemory
from .receiver_handle import MooncakeEmbeddingReceiver
from .session_engines import OpenEngine
from .settings import OriginSettings
from .write_marks import WriteMarks

log = logging.getLogger(__name__)

MAX_CLOSED_MAPPINGS = 64  # whose addresses are not used again yet
MAX_REGISTERED = 4096  # (rank, session) pairs that are remembered


class LanguageManager(MooncakeEmbeddingManager):
    """Owns one pool of blocks and every transfer into it from senders of the origin, for one language rank.

    Rooms that bring no blocks of their own get blocks in the order in which they ask, and hold none while they wait.

    Args:
        geometry: Layout (:func:`~.settings.origin_layout`), number of blocks and block size of the pool.
        settings, transfer, open_engine: As in :class:`MooncakeEmbeddingManager`.
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
        self.memory = PoolMemory(geometry)
        self.allocator = ReqToMetadataBlockAllocator(geometry.num_blocks, geometry.block_size)
        self._mapping: PoolMapping | None = None  # for new rooms
        self._tainted: list[PoolMapping] = []
        self._closed_mappings: deque[PoolMapping] = deque()
        self._receivers: dict[int, MooncakeEmbeddingReceiver] = {}
        self._waiting: deque[MooncakeEmbeddingReceiver] = deque()  # for blocks
        self._sides: dict[str, EncodeSide] = {}
        self._registered: dict[tuple[str, int, str], str] = {}  # (host, port, session id): bootstrap address
        self.start()

    def open(self, room: int, bootstrap_addr: str) -> MooncakeEmbeddingReceiver:
        """Returns the receiving end of ``room``. Call its ``init()`` next.

        Args:
            room: The ``bootstrap_room``.
            bootstrap_addr: Bootstrap server of the encode side that serves the room, ``host:port`` or a URL.
        """
        machine = ReceiverRoom(room, self.wire, self.transfer, self.settings.max_total_tokens)
        return MooncakeEmbeddingReceiver(self, machine, bootstrap_addr)

    def allocate(self, tokens: int, room: int) -> MetadataAllocation | None:
        """Returns blocks for ``init()`` or ``resume_transfer()`` of a room, or None if there are not enough."""
        with self.lock:
            return self.allocator.alloc(tokens, room)

    # For the receivers; the lock is held

    def begin(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation | None) -> None:
        """Looks for the encode side of a room, and requests the first tokens when it is found."""
        self.check()
        room, address, now = receiver.room, receiver.bootstrap_addr, self.now()
        if allocation is not None:
            self._check_allocation(allocation, room)
        if room in self._receivers:
            raise LocalProtocolError("the room is in use; draw another", room=room)
        if address not in self._sides:
            missed, lost = partial(self._side_missed, address), partial(self._side_lost, address)
            self._sides[address] = EncodeSide(
                address, self.settings, partial(self.call, missed), partial(self.call, lost)
            )
        self._usable_mapping()  # it is needed later, but here the caller can be told that no engine starts
        receiver.granted, receiver.automatic = allocation, allocation is None
        self._receivers[room] = receiver
        self._sides[address].find(
            room,
            now + self.transfer.bootstrap_timeout,
            lambda found: self.call(partial(self._on_found, receiver, found)),
        )
        receiver.machine.begin(now)

    def resume(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation | None) -> int:
        """Requests the rest into ``allocation``, or queues for blocks. Returns the number of tokens requested."""
        if allocation is None:
            if not receiver.automatic:
                receiver.automatic = True
                self._wait_for_blocks(receiver)
            return 0
        self._check_allocation(allocation, receiver.room)
        remaining = receiver.machine.total_tokens - receiver.transferred_tokens
        needed = blocks_needed(remaining, allocation.block_size)
        self.allocator.free(allocation.blocks[needed:], receiver.room)
        self._request(receiver, MetadataAllocation(allocation.blocks[:needed], allocation.block_size))
        return min(remaining, allocation.allocated_tokens)

    def fail(self, receiver: MooncakeEmbeddingReceiver, error: EmbeddingTransferError) -> None:
        """Ends the room with an error, unless it is over."""
        if not receiver.machine.over:
            receiver.machine.fail(error)
            self._changed(receiver)

    # The driver

    def collapsed(self) -> None:
        for receiver in self._receivers.values():
            receiver.notify(force=True)

    def _receive(self, frames: Sequence[bytes], now: float) -> None:
        try:
            message = read_status(frames)
        except RemoteProtocolError as error:
            log.warning("refused a status (room %s): %s", error.room, error.detail)
            return
        receiver = self._receivers.get(message.room)
        if receiver is None:
            log.warning("refused a status (room %d): the room is unknown, or over", message.room)
            return
        outcome = receiver.machine.receive(message.status, receiver.marks, now)
        if isinstance(outcome, Dropped):
            log.warning("refused a status (room %d): %s", message.room, outcome.reason)
        elif outcome is not None:
            self._gather(receiver, outcome)
        self._changed(receiver)

    def _expire(self, now: float) -> float | None:
        for receiver in list(self._receivers.values()):
            receiver.machine.tick(now)
            if receiver.machine.over:
                self._changed(receiver)
        self._allocate_in_turn()
        deadlines = (receiver.machine.deadline for receiver in self._receivers.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _end_transfers(self) -> None:
        for side in list(self._sides.values()):
            side.stop()
        with self.lock:
            for receiver in list(self._receivers.values()):
                receiver.abort(Aborted("the language side is shutting down", room=receiver.room, retryable=True))
            mappings = [*self._tainted, *([self._mapping] if self._mapping else [])]
            self._tainted, self._mapping = [], None
            for mapping in mappings:
                mapping.close()
            self._closed_mappings.extend(mappings)

    def _free_memory(self) -> None:
        for mapping in self._closed_mappings:
            mapping.release()
        self.memory.close()

    # The encode side

    def _on_found(self, receiver: MooncakeEmbeddingReceiver, found: EncodeRank | EmbeddingTransferError) -> None:
        if receiver.machine.over:
            return
        if isinstance(found, EmbeddingTransferError):
            self.fail(receiver, found)
            return
        receiver.encode_rank = found
        receiver.machine.found()
        if receiver.granted is None:
            self._wait_for_blocks(receiver)
        else:
            allocation, receiver.granted = receiver.granted, None
            self._request(receiver, allocation)

    def _side_missed(self, address: str) -> None:
        """Forgets the registrations: the encode side may have been restarted without them."""
        self._registered = {known: side for known, side in self._registered.items() if side != address}

    def _side_lost(self, address: str) -> None:
        self._side_missed(address)
        for receiver in [r for r in self._receivers.values() if r.bootstrap_addr == address]:
            self.fail(receiver, PeerGone(f"the encode side at {address} does not answer any more", room=receiver.room))

    # Rounds

    def _wait_for_blocks(self, receiver: MooncakeEmbeddingReceiver) -> None:
        self._waiting.append(receiver)
        self.wake()

    def _allocate_in_turn(self) -> None:
        """Allocates blocks to the rooms that wait for some, in their order."""
        while self._waiting and self.allocator.available:
            receiver = self._waiting.popleft()
            machine = receiver.machine
            if machine.over or machine.round is not None:
                continue  # it has ended, or its caller has brought blocks meanwhile
            remaining = machine.total_tokens - machine.transferred_tokens
            tokens = remaining if machine.rounds else self.transfer.default_allocate_tokens
            count = min(blocks_needed(tokens, self.geometry.block_size), self.allocator.available)
            allocation = self.allocator.alloc_blocks(count, receiver.room)
            assert allocation is not None
            self._request(receiver, allocation)

    def _request(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation) -> None:
        """Sends the request for a round, and before the first one to that rank the addresses of our buffers."""
        if receiver.mapping is None:
            try:
                receiver.mapping = self._usable_mapping()
            except TransportError as error:
                self.fail(receiver, error)
                return
            receiver.mapping.rooms.add(receiver.room)
        rank, mapping, room = receiver.encode_rank, receiver.mapping, receiver.room
        assert rank is not None
        receiver.current_allocation = allocation
        asked = receiver.machine.ask(allocation.blocks, self.now())
        receiver.marks = WriteMarks(self.memory, asked)
        here = (self.settings.reached_at, self.port, mapping.session_id)
        known = (rank.host, rank.port, mapping.session_id)
        if known not in self._registered:
            if len(self._registered) >= MAX_REGISTERED:
                del self._registered[next(iter(self._registered))]
            self._registered[known] = receiver.bootstrap_addr
            registration = EmbeddingArgsRegisterInfo("None", *here, mapping.pointers)
            self.push(rank.host, rank.port, write(registration, self.wire))
        request = TransferEmbeddingInfo(
            room, *here, asked.blocks, rank.required_dst_info_num, asked.sent_tokens, asked.allocated_tokens
        )
        self.push(rank.host, rank.port, write(request, self.wire))
        if asked.sent_tokens:
            log.info(
                "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d",
                *(room, asked.sent_tokens, asked.allocated_tokens),
            )
        self.wake()
        self._changed(receiver)

    def _gather(self, receiver: MooncakeEmbeddingReceiver, arrived: Arrived) -> None:
        """Copies tokens out of their blocks and frees these: no write to them is in flight."""
        machine, blocks = receiver.machine, arrived.round.blocks
        if not receiver.gathered:
            fields = self.geometry.layout.fields
            receiver.gathered = {
                field.name: np.empty((machine.total_tokens, field.token_bytes), np.uint8) for field in fields
            }
            receiver.aux = self.memory.aux[blocks[0]].copy()
        at, planes = arrived.round.sent_tokens, self.settings.mrope_planes
        gather(self.memory.data, blocks, arrived.tokens, receiver.gathered, at, planes=planes)
        receiver.marks = None
        self.allocator.free(blocks, receiver.room)
        if machine.needs_resume:
            log.info(
                "room %d: needs resume for remaining data: %d of %d tokens transferred",
                *(receiver.room, machine.transferred_tokens, machine.total_tokens),
            )
            if receiver.automatic:
                self._wait_for_blocks(receiver)
        elif machine.rounds > 1:
            log.info("room %d: completed with resumed transfer: %d transfers", receiver.room, machine.rounds)

    def _changed(self, receiver: MooncakeEmbeddingReceiver) -> None:
        """Ends the room if it is over, and reports the change."""
        if receiver.machine.over and self._receivers.pop(receiver.room, None) is not None:
            self._end(receiver)
        receiver.notify()

    def _end(self, receiver: MooncakeEmbeddingReceiver) -> None:
        mapping, room, asked = receiver.mapping, receiver.room, receiver.machine.round
        if receiver.error is not None:
            receiver.gathered = {}
        if mapping is not None:
            mapping.rooms.discard(room)
            if asked is not None:
                mapping.quarantined.append((room, asked.blocks))
                self.allocator.quarantine(asked.blocks, room)
            if mapping.quarantined and mapping is self._mapping:
                self._mapping = None
                self._tainted.append(mapping)
        self.allocator.free(self._held(room), room)
        self._close_tainted()
        self.wake()  # rooms may wait for these blocks

    # Blocks and mappings

    def _check_allocation(self, allocation: MetadataAllocation, room: int) -> None:
        if allocation.block_size != self.geometry.block_size or not allocation.blocks:
            raise LocalProtocolError("an allocation must come from manager.allocate", room=room)
        if not set(allocation.blocks) <= set(self._held(room)):
            raise LocalProtocolError("these blocks are not held by this room; see manager.allocate", room=room)

    def _held(self, room: int) -> list[int]:
        """Returns the blocks of a room without the quarantined ones."""
        blocks = self.allocator.holders().get(room, ())
        return [block for block in blocks if not self.allocator.is_quarantined(block)]

    def _usable_mapping(self) -> PoolMapping:
        """Returns the mapping for new rooms, made anew if the last one is tainted."""
        if self._mapping is None:
            self._mapping = PoolMapping(self.memory, self.open_engine)
        return self._mapping

    def _close_tainted(self) -> None:
        """Closes the tainted mappings that no room uses, and frees their quarantined blocks."""
        for mapping in [mapping for mapping in self._tainted if not mapping.rooms]:
            self._tainted.remove(mapping)
            mapping.close()
            for room, blocks in mapping.quarantined:
                self.allocator.release_quarantined(blocks, room)
            self._closed_mappings.append(mapping)
            if len(self._closed_mappings) > MAX_CLOSED_MAPPINGS:
                self._closed_mappings.popleft().release()
