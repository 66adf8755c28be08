"""A part that another rank of the same host receives: this rank maps its memory when it is complete."""

from __future__ import annotations

import os

import msgspec

from ..shared.shape import Shape
from ..shared.shared_rows import SharedRows
from .parts import Content, PartId, Source


class Announced(msgspec.Struct, frozen=True):
    """Memory with a complete embedding, as one rank tells the others of its host.

    Attributes:
        rid: SGLang's id of the request.
        index: Number of the part.
        host: Number of the host.
        pid: The process that holds the memory.
        fd: Its descriptor there.
        shape: The shape of the embedding.
        ranks: The ranks of the host.
    """

    rid: str
    index: int
    host: int
    pid: int
    fd: int
    shape: Shape
    ranks: int

    @classmethod
    def of(cls, rid: str, index: int, host: int, shared: SharedRows) -> Announced:
        """Describes the memory of this process."""
        return cls(rid, index, host, os.getpid(), shared.fd, shared.shape, len(shared.completed))


def map_announced(announced: Announced) -> SharedRows:
    """Maps memory of another process of the same user.

    Raises:
        RemoteProtocolError: The descriptor is not such memory.
        OSError: The process has ended, or the memory cannot be mapped.
    """
    fd = os.open(f"/proc/{announced.pid}/fd/{announced.fd}", os.O_RDWR | os.O_CLOEXEC)
    return SharedRows.adopt(fd, announced.shape, announced.ranks)


class MappedPart:
    """A part as a rank sees it that does not receive. The thread of the scheduler calls the methods.

    Attributes:
        source: Where the part comes from; None before the dispatcher has said so.
        shared: The memory, once the receiving rank has announced it.
        before: What the latest encoder had.
    """

    def __init__(self, rid: str) -> None:
        self._rid = rid
        self.source: Source | None = None
        self.shared: SharedRows | None = None
        self.before: Content | None = None

    @property
    def part(self) -> PartId | None:
        """The name of the part as the current encoder has it."""
        return None if self.source is None else self.source.part_of(self._rid)

    def comes_from(self, source: Source) -> bool:
        """Takes note of the encoder. Returns whether that is another one than before."""
        if self.source is not None and source.attempt <= self.source.attempt:
            return False
        self.source = source
        return True

    def made(self, content: Content) -> None:
        """Takes note of what the current encoder made."""
        self.before = content

    def poll(self) -> bool:
        """Returns whether the embedding is here."""
        return self.shared is not None

    def close(self) -> None:
        """Drops the memory. Arrays of it stay valid."""
        if self.shared is not None:
            self.shared.close()
