"""Messages as ZeroMQ frames: a receiver's registration, initial and resume requests, and a sender's statuses.

The names are the origin's. Frame 0 and the number of frames tell the messages apart. The bytes do not tell their
generation, so it is a setting of :class:`OriginWire`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

MAX_ROOM = (1 << 63) - 1
MAX_TOKENS = (1 << 40) - 1
MAX_PORT = 65535
MAX_DESTINATIONS = 4096
"""Largest number of destination ranks of one room."""
MAX_POINTER = (1 << 62) - 1
"""Larger than any address of a process; a pointer plus an offset stays below 63 bits."""
MIN_BUFFERS, MAX_BUFFERS = 4, 5
"""Base pointers of a registration. The fifth one, deepstack_embeddings, exists only where the model has any."""

POINTER = struct.Struct("=Q")

_DECIMAL = re.compile(rb"0|[1-9][0-9]*")
_HOST_NAME = re.compile(rb"[0-9A-Za-z._:%\[\]-]+")

REGISTER = b"None"
"""Frame 0 of a registration, which belongs to no room."""
REGISTER_FRAMES, INIT_FRAMES, RESUME_FRAMES = 5, 7, 8
MAX_FRAMES = 32
"""Largest number of frames. A resume may have more frames than are read here."""
MAX_FRAME_BYTES = 1 << 20


class Generation(Enum):
    """Form of ``TransferEmbeddingInfo``."""

    V3_0 = "v3.0"
    """The form of 2025-10-20: seven frames, one buffer index, no allocation. ``sent_tokens`` is above 0 in a resume."""
    BLOCKS = "blocks"
    """The later form: block indices and ``allocated_tokens``, and eight frames in a resume. Transfers use this one."""


@dataclass(frozen=True, slots=True)
class OriginWire:
    """Configuration of a deployment, the same at both ends. None of it is on the wire.

    Attributes:
        num_blocks: Blocks of the receiver's pool (in generation v3.0, buffers): the origin's
            ``SGLANG_EMBEDDING_CACHE_BUFFER_SIZE``.
        block_size: Tokens a block: the origin's ``SGLANG_EMBEDDING_CACHE_BLOCK_SIZE``.
        generation: Form of the requests.
        num_buffers: Base pointers that a registration must have; None for any number that the origin sends.
    """

    num_blocks: int
    block_size: int
    generation: Generation = Generation.BLOCKS
    num_buffers: int | None = None

    def __post_init__(self) -> None:
        if self.num_blocks < 1 or self.block_size < 1:
            raise LocalProtocolError(f"{self.num_blocks} blocks of {self.block_size} tokens hold nothing")


@dataclass(frozen=True, slots=True)
class EmbeddingArgsRegisterInfo:
    """Registration of a receiver's buffers, sent once a session, before its first request.

    ``dst_embedding_ptrs`` are in this order: input_embeddings, fill_ids, mrope_positions, aux_datas and, where there
    are any, deepstack_embeddings.
    """

    room: str
    endpoint: str
    dst_port: int
    mooncake_session_id: str
    dst_embedding_ptrs: tuple[int, ...]

    @classmethod
    def from_zmq(cls, frames: Sequence[bytes]) -> EmbeddingArgsRegisterInfo:
        """Reads a registration; see :func:`read`."""
        if len(frames) != REGISTER_FRAMES:
            raise RemoteProtocolError(f"a registration of {len(frames)} frames; it must have {REGISTER_FRAMES}")
        if frames[0] != REGISTER:
            raise RemoteProtocolError(f"a registration whose first frame is {_shown(frames[0])}, not None")
        return cls("None", *_address(frames), _pointers(frames[4]))

    def to_zmq(self) -> list[bytes]:
        """Returns the five frames, unchecked; :func:`write` checks."""
        return [*_head(self), b"".join(POINTER.pack(pointer) for pointer in self.dst_embedding_ptrs)]


@dataclass(frozen=True, slots=True)
class TransferEmbeddingInfo:
    """Request for tokens from ``sent_tokens`` on, to be written into the blocks ``dst_embedding_indices``.

    ``allocated_tokens`` is the number of blocks times the block size; 0 in generation v3.0, which does not carry it.
    """

    room: int
    endpoint: str
    dst_port: int
    mooncake_session_id: str
    dst_embedding_indices: tuple[int, ...]
    required_dst_info_num: int
    sent_tokens: int = 0
    allocated_tokens: int = 0

    @property
    def is_resume(self) -> bool:
        """Whether this is a request for the rest, rather than for the initial transfer."""
        return self.sent_tokens > 0

    @classmethod
    def from_zmq(cls, frames: Sequence[bytes], wire: OriginWire) -> TransferEmbeddingInfo:
        """Reads a request; see :func:`read`."""
        if len(frames) < INIT_FRAMES or (wire.generation is Generation.V3_0 and len(frames) > INIT_FRAMES):
            counts = "7" if wire.generation is Generation.V3_0 else "7, or 8 and more"
            raise RemoteProtocolError(
                f"a request of {len(frames)} frames; in generation {wire.generation.value} it has {counts}"
            )
        room = _number(frames[0], "the room", 0, MAX_ROOM)
        try:
            head = (room, *_address(frames))
            if wire.generation is Generation.V3_0:
                return cls(*head, *_one_buffer(frames, wire))
            return cls(*head, *_blocks(frames, wire))
        except RemoteProtocolError as error:
            error.room = room
            raise

    def to_zmq(self, generation: Generation = Generation.BLOCKS) -> list[bytes]:
        """Returns the frames, unchecked; :func:`write` checks."""
        numbers = [self.required_dst_info_num, self.sent_tokens, self.allocated_tokens]
        if generation is Generation.V3_0:
            del numbers[2]
        elif not self.is_resume:
            del numbers[1]
        blocks = ",".join(map(str, self.dst_embedding_indices)).encode("ascii")
        return [*_head(self), blocks, *(str(value).encode("ascii") for value in numbers)]


@dataclass(frozen=True, slots=True)
class TransferEmbeddingChunk:
    """A transfer that an encode side has queued: the embedding's ``total_tokens`` tokens in ``embedding_indices``.

    It is never on the wire.
    """

    room: int
    embedding_indices: tuple[int, ...]
    is_last: bool
    total_tokens: int
    sent_tokens: int = 0

    @property
    def chunk_info(self) -> tuple[int, int]:
        """Place of the chunk, (offset, length) in tokens."""
        return self.sent_tokens, self.total_tokens - self.sent_tokens


Request = EmbeddingArgsRegisterInfo | TransferEmbeddingInfo


def read(frames: Sequence[bytes], wire: OriginWire) -> Request:
    """Reads a message from frames that any process may have sent.

    Raises:
        RemoteProtocolError: The number of frames is wrong, or a frame is too long, malformed or out of bounds.
            ``room`` is set if the room could be read.
    """
    if not frames or len(frames) > MAX_FRAMES:
        raise RemoteProtocolError(f"a message of {len(frames)} frames; it must have 1 to {MAX_FRAMES}")
    longest = max(map(len, frames))
    if longest > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a frame of {longest} bytes; the limit is {MAX_FRAME_BYTES}")
    if frames[0] == REGISTER:
        message = EmbeddingArgsRegisterInfo.from_zmq(frames)
        count = len(message.dst_embedding_ptrs)
        if wire.num_buffers not in (None, count):
            raise RemoteProtocolError(
                f"{count} base pointers, but embeddings here lie in {wire.num_buffers} buffers. "
                "Serve the same model on both sides"
            )
        return message
    return TransferEmbeddingInfo.from_zmq(frames, wire)


def write(message: Request, wire: OriginWire) -> list[bytes]:
    """Returns the frames of a message, after checking them by the rules for a peer's message.

    Raises:
        LocalProtocolError: The peer would refuse the message.
    """
    try:
        frames = message.to_zmq(wire.generation) if isinstance(message, TransferEmbeddingInfo) else message.to_zmq()
        if read(frames, wire) == message:
            return frames
    except (RemoteProtocolError, ValueError, struct.error) as error:
        raise LocalProtocolError(f"every peer would refuse this message: {error}") from None
    raise LocalProtocolError(f"generation {wire.generation.value} cannot carry all of {message}")


@dataclass(frozen=True, slots=True)
class EmbeddingStatus:
    """The status of a room."""

    room: int
    status: KVPoll
    sender_rank: int | None = None
    """Rank of the sender, or -1, if the message had a third frame. Only a later development branch of the origin sends
    one. It is read and never written."""


def read_status(frames: Sequence[bytes]) -> EmbeddingStatus:
    """Reads a status of two or three frames from any peer.

    Raises:
        RemoteProtocolError: The number of frames or a frame is wrong. ``room`` is set if the room could be read.
    """
    if len(frames) not in (2, 3):
        raise RemoteProtocolError(f"a status of {len(frames)} frames; it must have 2, or 3 with the sender's rank")
    room = _number(frames[0], "the room", 0, MAX_ROOM)
    try:
        status = KVPoll(_number(frames[1], "the status", min(KVPoll), max(KVPoll)))
        rank = None
        if len(frames) == 3:
            rank = -1 if frames[2] == b"-1" else _number(frames[2], "the sender's rank", 0, 65535)
        return EmbeddingStatus(room, status, rank)
    except RemoteProtocolError as error:
        error.room = room
        raise


def write_status(message: EmbeddingStatus) -> list[bytes]:
    """Returns the two frames of a status.

    There are always two: the origin's receivers unpack exactly two, and a third one ends their only status thread.

    Raises:
        LocalProtocolError: A peer would refuse the message.
    """
    frames = [str(value).encode("ascii") for value in (message.room, int(message.status))]
    try:
        read_status(frames)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"every peer would refuse this status: {error}") from None
    return frames


def _head(message: Request) -> list[bytes]:
    parts = (message.room, message.endpoint, message.dst_port, message.mooncake_session_id)
    return [str(part).encode("ascii") for part in parts]


def _address(frames: Sequence[bytes]) -> tuple[str, int, str]:
    port = _number(frames[2], "the receiver's port", 1, MAX_PORT)
    return _host(frames[1]), port, _session_id(frames[3])


def _destinations(frames: Sequence[bytes]) -> int:
    return _number(frames[5], "required_dst_info_num", 1, MAX_DESTINATIONS)


def _one_buffer(frames: Sequence[bytes], wire: OriginWire) -> tuple[tuple[int, ...], int, int]:
    index = _number(frames[4], "the buffer index", 0, wire.num_blocks - 1)
    return (index,), _destinations(frames), _number(frames[6], "sent_tokens", 0, MAX_TOKENS)


def _blocks(frames: Sequence[bytes], wire: OriginWire) -> tuple[tuple[int, ...], int, int, int]:
    blocks = _block_indices(frames[4], wire.num_blocks)
    sent = 0
    if len(frames) >= RESUME_FRAMES:
        sent = _number(frames[6], "sent_tokens", 1, MAX_TOKENS)
        if sent % wire.block_size:
            raise RemoteProtocolError(f"sent_tokens is {sent}; a resume starts at a multiple of {wire.block_size}")
    allocation = frames[7] if sent else frames[6]
    allocated = _number(allocation, "allocated_tokens", 1, MAX_TOKENS)
    if allocated != len(blocks) * wire.block_size:
        raise RemoteProtocolError(
            f"allocated_tokens is {allocated}; {len(blocks)} blocks of {wire.block_size} tokens are "
            f"{len(blocks) * wire.block_size}. Configure the same block size on both sides"
        )
    return blocks, _destinations(frames), sent, allocated


# Values of single frames. Each function checks the length of a frame before it converts it.


def _shown(frame: bytes) -> str:
    """Returns a frame as text for an error message, cut off when it is long."""
    return repr(frame[:40])[1:] + ("…" if len(frame) > 40 else "")


def _number(frame: bytes, name: str, lowest: int, highest: int) -> int:
    """Reads ASCII decimal digits without sign, space or leading zero, in ``[lowest, highest]``."""
    if len(frame) > len(str(highest)) or not _DECIMAL.fullmatch(frame):
        raise RemoteProtocolError(f"{name} is {_shown(frame)}; it must be decimal digits, {lowest} to {highest}")
    value = int(frame)
    if not lowest <= value <= highest:
        raise RemoteProtocolError(f"{name} is {value}; it must be {lowest} to {highest}")
    return value


def _host(frame: bytes, name: str = "the receiver's host") -> str:
    """Reads a host name or an address, IPv6 included."""
    if len(frame) > 255 or not _HOST_NAME.fullmatch(frame):
        raise RemoteProtocolError(f"{name} is {_shown(frame)}; it must be a host name or address")
    return frame.decode("ascii")


def _session_id(frame: bytes) -> str:
    """Reads the ``host:port`` of a transfer engine."""
    name, colon, port = frame.rpartition(b":")
    if not colon:
        raise RemoteProtocolError(f"the session id is {_shown(frame)}; it must be host:port")
    _host(name, "the session's host")
    _number(port, "the session's port", 1, MAX_PORT)
    return frame.decode("ascii")


def _pointers(frame: bytes) -> tuple[int, ...]:
    """Reads base addresses, 8 bytes each in the byte order of this machine."""
    count, rest = divmod(len(frame), POINTER.size)
    if rest or not MIN_BUFFERS <= count <= MAX_BUFFERS:
        raise RemoteProtocolError(
            f"base pointers of {len(frame)} bytes; they must be {MIN_BUFFERS} or {MAX_BUFFERS} of {POINTER.size} bytes"
        )
    values = tuple(value for (value,) in POINTER.iter_unpack(frame))
    if not all(values):
        raise RemoteProtocolError("a base pointer is 0; every buffer must be registered before it is announced")
    if max(values) > MAX_POINTER:
        raise RemoteProtocolError(f"a base pointer is {max(values):#x}, which is no address; is its byte order ours?")
    return values


def _block_indices(frame: bytes, num_blocks: int) -> tuple[int, ...]:
    """Reads comma separated block indices below ``num_blocks``, at least one and each only once.

    Tokens fill the blocks in the order of the list.
    """
    if not frame:
        raise RemoteProtocolError("the list of blocks is empty; a request must bring at least one block")
    if len(frame) > num_blocks * (len(str(num_blocks)) + 1) or frame.count(b",") >= num_blocks:
        raise RemoteProtocolError(f"a list of blocks of {len(frame)} bytes; there are {num_blocks} blocks in all")
    blocks = tuple(_number(part, "a block index", 0, num_blocks - 1) for part in frame.split(b","))
    if len(set(blocks)) != len(blocks):
        raise RemoteProtocolError("a block stands twice in the list; its tokens would overwrite each other")
    return blocks
