"""Messages as ZeroMQ frames: a receiver's registration, initial and resume requests, and a sender's statuses.

The names are the origin's. :data:`FORMS` says which field each frame of a request holds, :data:`READERS` how a field is
read and checked. Frame 0 and the number of frames tell the messages apart. The bytes do not tell their generation, so
it is a setting of :class:`OriginWire`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from embferry.protocol.errors import LocalProtocolError, RemoteProtocolError
from embferry.protocol.states import KVPoll

MAX_ROOM = (1 << 63) - 1
MAX_TOKENS = (1 << 40) - 1
MAX_PORT = 65535
MAX_DESTINATIONS = 4096  # ranks of one room
MAX_POINTER = (1 << 62) - 1  # above any address of a process; a pointer plus an offset stays below 63 bits
BUFFERS = (
    4,
    5,
)  # base pointers of a registration; the fifth, deepstack_embeddings, exists only where the model has any
REGISTER = b"None"  # frame 0 of a registration, which belongs to no room
MAX_FRAMES = 32  # a resume may have more frames than are read here
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
class Head:
    """The first four frames of a request: the room, and where its receiver listens."""

    room: int
    endpoint: str
    dst_port: int
    mooncake_session_id: str


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
    def from_zmq(cls, frames: Sequence[bytes], wire: OriginWire) -> EmbeddingArgsRegisterInfo:
        """Reads a registration; see :func:`read`."""
        if len(frames) != len(REGISTER_FORM):
            raise RemoteProtocolError(f"a registration of {len(frames)} frames; it must have {len(REGISTER_FORM)}")
        if frames[0] != REGISTER:
            raise RemoteProtocolError(f"a registration whose first frame is {_shown(frames[0])}, not None")
        return cls("None", **_values(frames[1:], REGISTER_FORM[1:], wire))


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
        """Reads a request; see :func:`read`. Frames after the eighth are ignored."""
        generation, count, size = wire.generation, len(frames), wire.block_size
        form = FORMS[generation, count > 7]
        if count < 7 or count > len(form) == 7:
            counts = "7" if generation is Generation.V3_0 else "7, or 8 and more"
            raise RemoteProtocolError(f"a request of {count} frames; in generation {generation.value} it has {counts}")
        info = cls(**_values(frames, form, wire))
        blocks = len(info.dst_embedding_indices)
        if generation is Generation.BLOCKS and info.sent_tokens % size:
            why = f"sent_tokens is {info.sent_tokens}; a resume starts at a multiple of {size}"
            raise RemoteProtocolError(why, room=info.room)
        if generation is Generation.BLOCKS and info.allocated_tokens != blocks * size:
            why = f"allocated_tokens is {info.allocated_tokens}; {blocks} blocks of {size} tokens are {blocks * size}"
            raise RemoteProtocolError(f"{why}. Configure the same block size on both sides", room=info.room)
        return info


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


@dataclass(frozen=True, slots=True)
class EmbeddingStatus:
    """The status of a room. Only a later development branch of the origin sends ``sender_rank``, which may be -1."""

    room: int
    status: KVPoll
    sender_rank: int | None = None


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
    return (EmbeddingArgsRegisterInfo if frames[0] == REGISTER else TransferEmbeddingInfo).from_zmq(frames, wire)


def read_init_head(frames: Sequence[bytes]) -> Head | None:
    """Returns the head of an init that :func:`read` refuses, so that its receiver can be told.

    None if the message has not the number of frames of an init, or its head cannot be read.
    """
    if len(frames) != len(FORMS[Generation.BLOCKS, False]):
        return None
    try:
        return Head(**_values(frames, HEAD_FORM, None))
    except RemoteProtocolError:
        return None


def write(message: Request, wire: OriginWire) -> list[bytes]:
    """Returns the frames of a message, after checking them by the rules for a peer's message.

    Raises:
        LocalProtocolError: The peer would refuse the message.
    """
    resumes = isinstance(message, TransferEmbeddingInfo) and message.is_resume
    form = FORMS[wire.generation, resumes] if isinstance(message, TransferEmbeddingInfo) else REGISTER_FORM
    try:
        frames = _frames(message, form)
        if read(frames, wire) == message:
            return frames
    except (RemoteProtocolError, ValueError, struct.error) as error:
        raise LocalProtocolError(f"every peer would refuse this message: {error}") from None
    raise LocalProtocolError(f"generation {wire.generation.value} cannot carry all of {message}")


def read_status(frames: Sequence[bytes]) -> EmbeddingStatus:
    """Reads a status of two or three frames from any peer.

    Raises:
        RemoteProtocolError: The number of frames or a frame is wrong. ``room`` is set if the room could be read.
    """
    if len(frames) not in (2, 3):
        raise RemoteProtocolError(f"a status of {len(frames)} frames; it must have 2, or 3 with the sender's rank")
    return EmbeddingStatus(**_values(frames, STATUS_FORM, None))


def write_status(message: EmbeddingStatus) -> list[bytes]:
    """Returns the two frames of a status.

    There are always two: the origin's receivers unpack exactly two, and a third one ends their only status thread.

    Raises:
        LocalProtocolError: A peer would refuse the message.
    """
    frames = _frames(message, STATUS_FORM[:2])
    try:
        read_status(frames)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"every peer would refuse this status: {error}") from None
    return frames


# Fields in the order of their frames

HEAD_FORM = ("room", "endpoint", "dst_port", "mooncake_session_id")
REGISTER_FORM = (*HEAD_FORM, "dst_embedding_ptrs")
_BLOCKS = (*HEAD_FORM, "dst_embedding_indices", "required_dst_info_num")
FORMS = {
    (Generation.V3_0, False): (*_BLOCKS, "sent_tokens"),
    (Generation.V3_0, True): (*_BLOCKS, "sent_tokens"),
    (Generation.BLOCKS, False): (*_BLOCKS, "allocated_tokens"),
    (Generation.BLOCKS, True): (*_BLOCKS, "sent_tokens", "allocated_tokens"),
}
"""The fields of a request, by its generation and by whether it is a resume."""
STATUS_FORM = ("room", "status", "sender_rank")


def _frames(message: Request | EmbeddingStatus, form: Sequence[str]) -> list[bytes]:
    return [_frame(name, getattr(message, name)) for name in form]


def _frame(name: str, value: Any) -> bytes:
    if name == "dst_embedding_ptrs":
        return struct.pack(f"={len(value)}Q", *value)
    return (",".join(map(str, value)) if isinstance(value, tuple) else str(value)).encode("ascii")


def _values(frames: Sequence[bytes], form: Sequence[str], wire: OriginWire | None) -> dict[str, Any]:
    values: dict[str, Any] = {}
    try:
        for name, frame in zip(form, frames, strict=False):
            values[name] = READERS[name](frame, wire)
    except RemoteProtocolError as error:
        error.room = values.get("room")
        raise
    return values


# Readers of single frames. Each one checks the length of a frame before it converts it.


def _shown(frame: bytes) -> str:
    """Returns a frame as text for an error message, cut off when it is long."""
    return repr(frame[:40])[1:] + ("…" if len(frame) > 40 else "")


def _number(frame: bytes, name: str, lowest: int, highest: int) -> int:
    """Reads ASCII decimal digits without sign, space or leading zero, in ``[lowest, highest]``."""
    if len(frame) > len(str(highest)) or not re.fullmatch(rb"0|[1-9][0-9]*", frame):
        raise RemoteProtocolError(f"{name} is {_shown(frame)}; it must be decimal digits, {lowest} to {highest}")
    value = int(frame)
    if not lowest <= value <= highest:
        raise RemoteProtocolError(f"{name} is {value}; it must be {lowest} to {highest}")
    return value


def _host(frame: bytes, name: str) -> str:
    """Reads a host name or an address, IPv6 included."""
    if len(frame) > 255 or not re.fullmatch(rb"[0-9A-Za-z._:%\[\]-]+", frame):
        raise RemoteProtocolError(f"{name} is {_shown(frame)}; it must be a host name or address")
    return frame.decode("ascii")


def _session_id(frame: bytes) -> str:
    """Reads the ``host:port`` of a transfer engine."""
    host, colon, port = frame.rpartition(b":")
    if not colon:
        raise RemoteProtocolError(f"the session id is {_shown(frame)}; it must be host:port")
    _host(host, "the session's host")
    _number(port, "the session's port", 1, MAX_PORT)
    return frame.decode("ascii")


def _pointers(frame: bytes, wire: OriginWire) -> tuple[int, ...]:
    """Reads base addresses, 8 bytes each in the byte order of this machine."""
    count, rest = divmod(len(frame), 8)
    if rest or count not in BUFFERS:
        raise RemoteProtocolError(f"base pointers of {len(frame)} bytes; they must be 4 or 5 of 8 bytes")
    if wire.num_buffers not in (None, count):
        why = f"{count} base pointers, but embeddings here lie in {wire.num_buffers} buffers"
        raise RemoteProtocolError(f"{why}. Serve the same model on both sides")
    values = struct.unpack(f"={count}Q", frame)
    if not all(values):
        raise RemoteProtocolError("a base pointer is 0; every buffer must be registered before it is announced")
    if max(values) > MAX_POINTER:
        raise RemoteProtocolError(f"a base pointer is {max(values):#x}, which is no address; is its byte order ours?")
    return values


def _block_indices(frame: bytes, wire: OriginWire) -> tuple[int, ...]:
    """Reads comma separated indices, at least one and each only once. Tokens fill the blocks in this order."""
    count = wire.num_blocks
    if wire.generation is Generation.V3_0:
        return (_number(frame, "the buffer index", 0, count - 1),)
    if not frame:
        raise RemoteProtocolError("the list of blocks is empty; a request must bring at least one block")
    if len(frame) > count * (len(str(count)) + 1) or frame.count(b",") >= count:
        raise RemoteProtocolError(f"a list of blocks of {len(frame)} bytes; there are {count} blocks in all")
    blocks = tuple(_number(part, "a block index", 0, count - 1) for part in frame.split(b","))
    if len(set(blocks)) != len(blocks):
        raise RemoteProtocolError("a block stands twice in the list; its tokens would overwrite each other")
    return blocks


def _sent_tokens(frame: bytes, wire: OriginWire) -> int:
    return _number(frame, "sent_tokens", 0 if wire.generation is Generation.V3_0 else 1, MAX_TOKENS)


READERS: dict[str, Callable[[bytes, Any], Any]] = {
    "room": lambda frame, _: _number(frame, "the room", 0, MAX_ROOM),
    "endpoint": lambda frame, _: _host(frame, "the receiver's host"),
    "dst_port": lambda frame, _: _number(frame, "the receiver's port", 1, MAX_PORT),
    "mooncake_session_id": lambda frame, _: _session_id(frame),
    "dst_embedding_ptrs": _pointers,
    "dst_embedding_indices": _block_indices,
    "required_dst_info_num": lambda frame, _: _number(frame, "required_dst_info_num", 1, MAX_DESTINATIONS),
    "sent_tokens": _sent_tokens,
    "allocated_tokens": lambda frame, _: _number(frame, "allocated_tokens", 1, MAX_TOKENS),
    "status": lambda frame, _: KVPoll(_number(frame, "the status", min(KVPoll), max(KVPoll))),
    "sender_rank": lambda frame, _: -1 if frame == b"-1" else _number(frame, "the sender's rank", 0, 65535),
}
"""Functions that read a field from its frame by the rules of an :class:`OriginWire`."""
