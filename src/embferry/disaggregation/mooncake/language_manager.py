"""The language side of the origin's wire: requests tokens, gathers what arrives, requests the rest."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Unpack

import numpy as np
import numpy.typing as npt

from embferry.memory.blocks import MetadataAllocation, blocks_needed
from embferry.memory.buffers import AUX_WIDTH
from embferry.protocol.errors import (
    CapacityError,
    EmbeddingTransferError,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
)
from embferry.protocol.layout import Geometry
from embferry.transfer.fields import Array

from ..wire.messages import EmbeddingArgsRegisterInfo, TransferEmbeddingInfo, read_status, write
from ..wire.receiver_room import ReceiverRoom, Round
from .buffer_layout import gather
from .encode_ranks import EncodeRank, EncodeSide
from .manager import MooncakeEmbeddingManager, Options, OriginHandle
from .pool_mapping import Pool, PoolMapping
from .write_marks import WriteMarks

log = logging.getLogger(__name__)

MAX_REGISTERED = 4096  # (rank, session) pairs that are remembered
MAX_SIDES = 256  # bootstrap servers, each with a thread that asks for its health; those without rooms make room


class LanguageManager(MooncakeEmbeddingManager):
    """Owns one pool of blocks and every transfer into it from senders of the origin, for one language rank.

    Rooms that bring no blocks of their own get blocks in the order in which they ask, and hold none while they wait.

    Args:
        geometry: Layout (:func:`~.settings.origin_layout`), number of blocks and block size of the pool.
        options: ``settings``, ``transfer`` and ``open_engine``, as in :class:`MooncakeEmbeddingManager`.
    """

    side: ClassVar[str] = "language"

    def __init__(self, geometry: Geometry, **options: Unpack[Options]) -> None:
        super().__init__("embferry-origin-receive", geometry, **options)
        self.pool = Pool(geometry, lambda: self.open_engine())
        self.buffers, self.allocator = self.pool.data, self.pool.allocator
        self.handles: dict[int, MooncakeEmbeddingReceiver] = {}
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
        if room in self.handles:
            raise LocalProtocolError("the room is in use; draw another", room=room)
        if address not in self._sides:
            self._make_room_for_a_side(room)
            missed, lost = (partial(self.call, partial(f, address)) for f in (self._side_missed, self._side_lost))
            self._sides[address] = EncodeSide(address, self.settings, missed, lost)
        self.pool.mapping()  # it is needed later, but here the caller can be told that no engine starts
        receiver.granted, receiver.automatic = allocation, allocation is None
        self.handles[room] = receiver
        deadline = now + self.transfer.bootstrap_timeout
        self._sides[address].find(room, deadline, lambda found: self.call(partial(self._on_found, receiver, found)))
        receiver.machine.begin(now)

    def resume(self, receiver: MooncakeEmbeddingReceiver, allocation: MetadataAllocation | None) -> int:
        """Requests the rest into ``allocation``, or queues for blocks. Returns the number of tokens requested."""
        if allocation is None:
            if not receiver.automatic:
                receiver.automatic = True
                self._waiting.append(receiver)
                self.wake()
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

    def _receive(self, frames: Sequence[bytes], now: float) -> None:
        message = read_status(frames)
        receiver = self.handles.get(message.room)
        if receiver is None:
            raise RemoteProtocolError("the room is unknown, or over", room=message.room)
        arrived = receiver.machine.receive(message.status, receiver.marks, now)
        if arrived is not None:
            self._gather(receiver, *arrived)
        self._changed(receiver)

    def _expire(self, now: float) -> float | None:
        for receiver in list(self.handles.values()):
            receiver.machine.tick(now)
            if receiver.machine.over:
                self._changed(receiver)
        self._allocate_in_turn()
        deadlines = (receiver.machine.deadline for receiver in self.handles.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def _end_transfers(self) -> None:
        for side in list(self._sides.values()):
            side.stop()
        super()._end_transfers()
        with self.lock:
            self.pool.close()

    def _free_memory(self) -> None:
        self.pool.free()

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
            self._waiting.append(receiver)
        else:
            allocation, receiver.granted = receiver.granted, None
            self._request(receiver, allocation)

    def _side_missed(self, address: str) -> None:
        """Forgets the registrations: the encode side may have been restarted without them."""
        self._registered = {known: side for known, side in self._registered.items() if side != address}

    def _side_lost(self, address: str) -> None:
        self._side_missed(address)
        for receiver in [r for r in self.handles.values() if r.bootstrap_addr == address]:
            self.fail(receiver, PeerGone(f"the encode side at {address} does not answer any more"))

    def _make_room_for_a_side(self, room: int) -> None:
        """Forgets encode sides that no room uses, if there are too many."""
        used = {receiver.bootstrap_addr for receiver in self.handles.values()}
        for address in [address for address in self._sides if address not in used]:
            if len(self._sides) < MAX_SIDES:
                return
            self._sides.pop(address).leave()
            self._side_missed(address)
        if len(self._sides) >= MAX_SIDES:
            why = f"{MAX_SIDES} bootstrap servers are in use; a room at another one has to wait"
            raise CapacityError(why, room=room)

    # Rounds

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
                receiver.mapping = self.pool.mapping()
            except TransportError as error:
                self.fail(receiver, error)
                return
            receiver.mapping.rooms.add(receiver.room)
        rank, mapping, room = receiver.encode_rank, receiver.mapping, receiver.room
        assert rank is not None
        receiver.current_allocation = allocation
        asked = receiver.machine.ask(allocation.blocks, self.now())
        receiver.marks = WriteMarks(self.buffers, asked)
        here = (self.settings.reached_at, self.port, mapping.session_id)
        known = (rank.host, rank.port, mapping.session_id)
        if known not in self._registered:
            if len(self._registered) >= MAX_REGISTERED:
                del self._registered[next(iter(self._registered))]
            self._registered[known] = receiver.bootstrap_addr
            registration = EmbeddingArgsRegisterInfo("None", *here, mapping.pointers)
            self.push(rank.host, rank.port, write(registration, self.wire))
        tokens = asked.sent_tokens, asked.allocated_tokens
        request = TransferEmbeddingInfo(room, *here, asked.blocks, rank.required_dst_info_num, *tokens)
        self.push(rank.host, rank.port, write(request, self.wire))
        if asked.sent_tokens:
            level, extra = logging.INFO if receiver.machine.rounds == 2 else logging.DEBUG, {"room": room}
            text = "room %d: needs resume for remaining data: %d of %d tokens transferred"
            log.log(level, text, room, asked.sent_tokens, receiver.machine.total_tokens, extra=extra)
            text = "Sent resume transfer request: room %d, sent_tokens %d, allocated_tokens %d"
            log.log(level, text, room, *tokens, extra=extra)
        self.wake()
        self._changed(receiver)

    def _gather(self, receiver: MooncakeEmbeddingReceiver, asked: Round, tokens: int) -> None:
        """Copies tokens out of their blocks and frees these: no write to them is in flight."""
        machine, room, blocks = receiver.machine, receiver.room, asked.blocks
        if not receiver.gathered:
            shapes = {field.name: (machine.total_tokens, field.token_bytes) for field in self.geometry.layout.fields}
            receiver.gathered = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
            receiver.aux = self.buffers.aux_datas[blocks[0]].copy()
        planes = self.settings.mrope_planes
        gather(self.buffers, blocks, tokens, receiver.gathered, asked.sent_tokens, planes=planes)
        receiver.marks = None
        self.allocator.free(blocks, room)
        if machine.needs_resume:
            if receiver.automatic:
                self._waiting.append(receiver)
        elif machine.rounds > 1:
            text = "room %d: completed with resumed transfer: %d transfers"
            log.info(text, room, machine.rounds, extra={"room": room})

    def _changed(self, receiver: MooncakeEmbeddingReceiver) -> None:
        """Ends the room if it is over, and reports the change."""
        machine = receiver.machine
        if machine.over and self.handles.pop(receiver.room, None) is not None:
            if machine.error is not None:
                receiver.gathered = {}
            self.pool.leave(receiver.room, receiver.mapping, machine.round.blocks if machine.round else ())
            self.wake()  # rooms may wait for these blocks
        receiver.report()

    def _check_allocation(self, allocation: MetadataAllocation, room: int) -> None:
        if allocation.block_size != self.geometry.block_size or not allocation.blocks:
            raise LocalProtocolError("an allocation must come from manager.allocate", room=room)
        if not set(allocation.blocks) <= set(self.pool.held(room)):
            raise LocalProtocolError("these blocks are not held by this room; see manager.allocate", room=room)


class MooncakeEmbeddingReceiver(OriginHandle):
    """The receiving end of one room, for senders of the origin. Made by :meth:`LanguageManager.open`.

    Attributes:
        bootstrap_addr: URL of the bootstrap server of the encode side.
        current_allocation: Blocks of the latest request.
        aux: ``aux_datas`` of the embedding once tokens have arrived, int32 [16]: [0] is its length, [1] its mrope
            position delta.
    """

    manager: LanguageManager
    machine: ReceiverRoom

    def __init__(self, manager: LanguageManager, machine: ReceiverRoom, bootstrap_addr: str) -> None:
        super().__init__(manager, machine)
        self.bootstrap_addr = bootstrap_addr if "://" in bootstrap_addr else f"http://{bootstrap_addr}"
        self.current_allocation: MetadataAllocation | None = None
        self.aux: npt.NDArray[np.int32] = np.zeros(AUX_WIDTH, np.int32)
        self._begun = False
        # For the manager
        self.gathered: dict[str, Array] = {}  # what tokens are gathered into, once the first have arrived
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
                why = f"resume at token {self.transferred_tokens}, not at {sent_tokens}"
                raise LocalProtocolError(why, room=self.room)
            return self.manager.resume(self, allocation)

    def _fail(self, error: EmbeddingTransferError) -> None:
        """Ends the transfer. The encode side runs into its time-out, because this wire has no message to tell it."""
        if self._begun:
            self.manager.fail(self, error)

    def clear(self) -> None:
        """Ends the transfer if it goes on, and drops the arrays."""
        self.abort()
        with self.manager.lock:
            self.gathered = {}

    # What has arrived

    @property
    def transport(self) -> str:
        """Name of the transport in use."""
        return "mooncake"

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

    def buffered_chunks(self) -> dict[str, Array] | None:
        """Returns what has arrived, field name to uint8 [transferred_tokens, bytes a token], or None."""
        with self.manager.lock:
            tokens = self.transferred_tokens
            return {name: array[:tokens] for name, array in self.gathered.items()} or None

    def arrays(self) -> dict[str, Array]:
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
