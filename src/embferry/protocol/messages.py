"""The control messages: MessagePack arrays, bounded in every dimension.

``docs/protocol.md`` is the specification. A frame is ``[version, source, target, body]``; ``source`` and ``target`` are
sessions: each end of each transfer draws a new one, so that a message meant for an earlier incarnation of a peer is
recognised and dropped. A body is ``[tag, room, ...]``. Field names do not travel; their order does.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .errors import EmbeddingTransferError, RemoteProtocolError, VersionMismatch, from_code
from .layout import MAX_NAME, Geometry

VERSION = 1
VERSIONS = (1, 1)
"""The oldest and the newest protocol version spoken here."""

MAX_FRAME_BYTES = 1 << 20
MAX_TOKENS = (1 << 40) - 1
MAX_RUNS = 16384
MAX_CHUNKS = 4096
MAX_TEXT = 1024
MAX_ENDPOINT = 256
MAX_HANDLE = 1024
MAX_DIGEST = 64
MAX_AUX = 16
MAX_ID = (1 << 63) - 1
MAX_TRANSPORTS = 8

Id = Annotated[int, Meta(ge=0, le=MAX_ID)]
Tokens = Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
Count = Annotated[int, Meta(ge=1, le=1 << 32)]
BlockIndex = Annotated[int, Meta(ge=0, lt=1 << 32)]
Text = Annotated[str, Meta(max_length=MAX_TEXT)]
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Digest = Annotated[bytes, Meta(max_length=MAX_DIGEST)]
Checksum = Annotated[bytes, Meta(min_length=8, max_length=8)]
Epochs = Annotated[tuple[Id, ...], Meta(max_length=4096)]


class Message(Struct, frozen=True, array_like=True, tag_field="type", gc=False):
    """Every message names its room first."""

    room: Id


class TransportAddress(Struct, frozen=True, array_like=True, gc=False):
    """A transport by which one end can be reached, and the handle to connect with."""

    name: Name
    handle: Annotated[bytes, Meta(max_length=MAX_HANDLE)]


class Chunk(Struct, frozen=True, array_like=True, gc=False):
    """Tokens ``[offset, offset + length)``; ``checksum`` is xxh3-64, big-endian, over their bytes, field by field.

    None if the receiver's ``open`` asked for none.
    """

    offset: Tokens
    length: Count
    checksum: Checksum | None


# Receiver to sender


class Open(Message, frozen=True, array_like=True, tag="open", gc=False):
    """The receiver introduces itself and asks for an offer."""

    generation: Id
    """Rises whenever the receiver asks for a new offer. The offer repeats it, which tells it from a stale one."""
    versions: tuple[Id, Id]
    geometry: Geometry
    endpoint: Annotated[str, Meta(min_length=1, max_length=MAX_ENDPOINT)]
    transports: Annotated[tuple[TransportAddress, ...], Meta(min_length=1, max_length=MAX_TRANSPORTS)]
    transferred_tokens: Tokens
    verify: bool = True
    """Whether every chunk must have a checksum."""


class Grant(Message, frozen=True, array_like=True, tag="grant", gc=False):
    """Write tokens ``[sent_tokens, sent_tokens + allocated_tokens)`` into these blocks, from the first one's start.

    The first grant of a room is the initial transfer; every later one is a resumed transfer.
    """

    epoch: Id
    sent_tokens: Tokens
    allocated_tokens: Count
    runs: Annotated[tuple[tuple[BlockIndex, Count], ...], Meta(min_length=1, max_length=MAX_RUNS)]
    """The blocks, as (first, count) runs of adjacent ones."""
    floor: Id
    """Every epoch of this session below it is closed."""
    transport: Name
    """The transport over which the blocks are open under this epoch: that of the latest offer received."""


class Progress(Message, frozen=True, array_like=True, tag="progress", gc=False):
    """Tokens ``[0, transferred_tokens)`` are verified and will never be requested again. Also the heartbeat."""

    transferred_tokens: Tokens
    floor: Id


class Drain(Message, frozen=True, array_like=True, tag="drain", gc=False):
    """Asks the sender to stop writing under these epochs, and to answer when no write is in flight."""

    epochs: Epochs


class Confirm(Message, frozen=True, array_like=True, tag="confirm", gc=False):
    """Everything has arrived and is verified: the sender may release the embedding."""

    transferred_tokens: Tokens


# Sender to receiver


class Offer(Message, frozen=True, array_like=True, tag="offer", gc=False):
    """Announces the embedding, as soon as its length is known, which is before the encoder runs."""

    generation: Id
    """The generation of the ``open`` message that this one answers."""
    version: Id
    transport: Name
    """The transport that the sender chose from the receiver's. If it differs from the last one, that one has failed."""
    total_tokens: Annotated[int, Meta(ge=-1, le=MAX_TOKENS)]
    """-1: not known yet."""
    content_digest: Digest
    """Equal digests promise equal bytes; empty while the length is not known."""
    aux: Annotated[tuple[Annotated[int, Meta(ge=-(1 << 31), le=(1 << 31) - 1)], ...], Meta(max_length=MAX_AUX)] = ()
    """Up to 16 int32 that travel with the tokens, for use by the peers. The origin's ``aux_datas``."""
    address: Annotated[bytes, Meta(max_length=MAX_HANDLE)] = b""
    """The sender's address on a transport where the receiver fetches; otherwise empty."""


class Pending(Message, frozen=True, array_like=True, tag="pending", gc=False):
    """The grant was received; its tokens are not ready yet, or are being written."""

    epoch: Id
    """0: there is no grant yet. The worker keeps the ``open`` until it opens the room itself."""


class Written(Message, frozen=True, array_like=True, tag="written", gc=False):
    """These chunks are in the receiver's blocks, and no write to them is in flight."""

    epoch: Id
    chunks: Annotated[tuple[Chunk, ...], Meta(min_length=1, max_length=MAX_CHUNKS)]


class WriteFailed(Message, frozen=True, array_like=True, tag="write_failed", gc=False):
    """Tokens ``[offset, offset + length)`` were not written under this epoch, and will not be."""

    epoch: Id
    offset: Tokens
    length: Count
    code: Name
    detail: Text
    retryable: bool

    @property
    def error(self) -> EmbeddingTransferError:
        found = from_code(self.code, self.detail, room=self.room)
        found.retryable = self.retryable
        return found


class Drained(Message, frozen=True, array_like=True, tag="drained", gc=False):
    """No write under these epochs is in flight, and none will be started."""

    epochs: Epochs


class Closed(Message, frozen=True, array_like=True, tag="closed", gc=False):
    """The confirmation, or the abort, was received."""


class Unknown(Message, frozen=True, array_like=True, tag="unknown", gc=False):
    """The session that a message was meant for does not exist any more."""

    missing: Id


# Either way


class Abort(Message, frozen=True, array_like=True, tag="abort", gc=False):
    """The transfer has failed. ``code`` is one of :mod:`~.errors`; ``detail`` says what to do."""

    code: Name
    detail: Text
    generation: Id = 0
    """From a sender: the receiver's latest generation that it knows, as in an offer."""

    @classmethod
    def because_of(cls, error: EmbeddingTransferError, room: int, generation: int = 0) -> Abort:
        return cls(room, *words(error), generation)

    @property
    def error(self) -> EmbeddingTransferError:
        return from_code(self.code, self.detail, room=self.room)


ToSender = Open | Grant | Progress | Drain | Confirm | Abort
ToReceiver = Offer | Pending | Written | WriteFailed | Drained | Closed | Unknown | Abort
Body = (
    Open
    | Grant
    | Progress
    | Drain
    | Confirm
    | Abort
    | Offer
    | Pending
    | Written
    | WriteFailed
    | Drained
    | Closed
    | Unknown
)


class Frame(Struct, frozen=True, array_like=True, gc=False):
    """One control message on the wire."""

    version: Id
    source: Id
    target: Id
    """0: the session that serves the room, as in ``open``."""
    body: Body


class _Version(Struct, frozen=True, array_like=True, gc=False):
    """The part of a frame that every version reads alike."""

    version: Id


def sendable(text: str, longest: int) -> str:
    """Returns ``text`` with lone surrogates replaced by question marks, cut to ``longest`` characters."""
    return str(text)[:longest].encode("utf-8", "replace").decode()


def words(error: EmbeddingTransferError) -> tuple[str, str]:
    """Returns code and detail of an error as a message can carry them."""
    return sendable(error.code, MAX_NAME) or EmbeddingTransferError.code, sendable(error.detail, MAX_TEXT)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)
_version_decoder = msgspec.msgpack.Decoder(_Version)


def encode(frame: Frame) -> bytes:
    """Returns the bytes of a frame."""
    return _encoder.encode(frame)


def decode(data: bytes | memoryview) -> Frame:
    """Decodes untrusted bytes.

    Raises:
        RemoteProtocolError: Too long, not MessagePack, or out of bounds; the detail says where.
        VersionMismatch: Well-formed, of a version not spoken here.
    """
    if len(data) > MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a control message of {len(data)} bytes; the limit is {MAX_FRAME_BYTES}")
    try:
        version = _version_decoder.decode(data).version  # first: the rest may look different in another one
        if VERSIONS[0] <= version <= VERSIONS[1]:
            return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # the middle one is not msgspec's own
        raise RemoteProtocolError(f"a control message that cannot be read: {error}") from None
    raise VersionMismatch(f"a message of protocol version {version}; {VERSIONS[0]} to {VERSIONS[1]} are spoken")


def common_version(theirs: tuple[int, int]) -> int:
    """Returns the newest version that both peers speak.

    Raises:
        VersionMismatch: There is none; the detail names both ranges.
    """
    newest = min(VERSIONS[1], theirs[1])
    if newest < max(VERSIONS[0], theirs[0]):
        raise VersionMismatch(
            f"protocol versions {VERSIONS[0]}-{VERSIONS[1]} here, {theirs[0]}-{theirs[1]} there: upgrade the older peer"
        )
    return newest
