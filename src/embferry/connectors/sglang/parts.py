"""Names of the parts of a request, and what a language server's dispatcher says about them.

SGLang sends all items of one kind of a request that go to one encoder as one part, and knows a part by a text that
begins with the request's id. A client chooses that id, and may use it twice. Therefore the text has a random name as
well, one for each dispatch, and the attempt: what an earlier dispatch or an encoder that was given up still sends
belongs to no part.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

import msgspec

from embferry import Layout, LocalProtocolError, RemoteProtocolError
from embferry.protocol.layout import MAX_DTYPE, MAX_WIDTH
from embferry.transfer.control.endpoint import check_endpoint

from ..shared.shape import Shape

SEPARATOR = "_local_part_"
"""Separator that SGLang has between the id of a request and the number of a part."""
SOURCE_CODE = 199
"""In place of an HTTP status in SGLang's message of a failed dispatch: its text is a :class:`Source`."""
MAX_PARTS = 4096
ROOM_BITS = 63

_SUFFIX = re.compile(r"([0-9a-f]{32})\.(\d{1,4})\.(\d{1,4})\Z")

Index = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PARTS)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class PartId(msgspec.Struct, frozen=True):
    """One part of one dispatch of a request.

    Attributes:
        rid: SGLang's id of the request.
        name: 128 random bits of the dispatch, hexadecimal.
        index: Number of the part in the request.
        attempt: How many encoders were asked for it before.
    """

    rid: str
    name: Name
    index: Index
    attempt: Index = 0

    @property
    def text(self) -> str:
        """The id of the part, for SGLang."""
        return f"{self.rid}{SEPARATOR}{self.name}.{self.index}.{self.attempt}"

    def room(self, host: int) -> int:
        """Returns the room of the part for the ranks of one host; the same for every attempt."""
        content = f"{self.name} {self.index} {host}".encode()
        digest = hashlib.blake2b(content, digest_size=8).digest()
        return int.from_bytes(digest) >> 64 - ROOM_BITS


def parse(text: str) -> PartId | None:
    """Returns the part that a text names, or None: a part of SGLang's own, as a health check has it."""
    rid, separator, suffix = text.rpartition(SEPARATOR)
    found = _SUFFIX.match(suffix)
    if not separator or found is None or int(found[2]) >= MAX_PARTS or int(found[3]) >= MAX_PARTS:
        return None
    return PartId(rid, found[1], int(found[2]), int(found[3]))


class EncoderInfo(msgspec.Struct, frozen=True):
    """Description of one kind of media by an encoder.

    Attributes:
        endpoint: Where its send manager takes control messages.
        dtype: Name of the elements' type, such as "bfloat16".
        width: Elements per token, deepstack's levels included.
    """

    endpoint: str
    dtype: Annotated[str, msgspec.Meta(max_length=MAX_DTYPE)]
    width: Annotated[int, msgspec.Meta(ge=1, le=MAX_WIDTH)]

    @property
    def layout(self) -> Layout:
        """The layout of one token."""
        return Shape(1, self.width, self.dtype).layout

    @property
    def kind(self) -> str:
        """Type and width, for texts: the same at every encoder of a model."""
        return f"{self.dtype}[{self.width}]"


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a part comes from: the dispatcher tells each scheduler, at first and after each failover.

    Attributes:
        name: Of the dispatch.
        index: Number of the part.
        attempt: The latest source counts.
        url: The encoder's.
        info: The encoder's, for this kind of media.
    """

    name: Name
    index: Index
    attempt: Index
    url: str
    info: EncoderInfo

    def part_of(self, rid: str) -> PartId:
        return PartId(rid, self.name, self.index, self.attempt)


def decode_source(text: str) -> Source:
    """Reads a source. Raises RemoteProtocolError if it is malformed."""
    try:
        source = msgspec.json.decode(text, type=Source)
        check_endpoint(source.info.endpoint)
    except (msgspec.MsgspecError, LocalProtocolError) as error:
        raise RemoteProtocolError(f"a malformed message of the dispatcher: {error}") from None
    return source


def encode_source(source: Source) -> str:
    return msgspec.json.encode(source).decode()


class Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of one encode of a part.

    Attributes:
        content: The content digest of its transfers, hexadecimal.
        digest: ``digest_of`` the rows, hexadecimal.
    """

    content: Digest
    digest: Digest


class Destination(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rank of a language server that asks an encoder for a part.

    Attributes:
        part: The text of the part.
        url: Where SGLang's own message about the part goes: host and port.
        count: How many ranks ask.
        host: Number of the rank's host among those of the language server.
        receives: Whether this rank receives the embedding for its host; the others map it.
        before: What the encoder before had, after a failover, if any of it may have arrived.
    """

    part: Annotated[str, msgspec.Meta(max_length=1024)]
    url: Annotated[str, msgspec.Meta(max_length=512)]
    count: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    host: Index
    receives: bool
    before: Content | None = None
