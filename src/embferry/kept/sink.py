"""The sink that gathers an embedding into such a file."""

from __future__ import annotations

import logging
from collections.abc import Generator

from embferry.protocol.commands import Deliver, Verify
from embferry.protocol.errors import shown
from embferry.protocol.kept import KeptTokens
from embferry.transfer.fields import Array
from embferry.transfer.sinks import GatherSink, plain_arrays

from .file import KeptFile
from .folder import KeptFolder
from .form import Record

log = logging.getLogger(__name__)


class KeptSink(GatherSink):
    """A :class:`GatherSink` whose arrays are a file of ``folder``, or ordinary memory if that cannot be had.

    A chunk is copied into the file while it is verified, as into any other memory. It is recorded when it is delivered:
    a chunk of another content, or one that is damaged, never is. :meth:`drop` removes the file.

    Args:
        folder: Where the file is made.
        file: A file with a part of the embedding, which was taken over; None: a new one.
    """

    def __init__(self, folder: KeptFolder, file: KeptFile | None = None) -> None:
        super().__init__(make=self._new_arrays)
        self._folder, self._file = folder, file
        self._kept_at_first = None if file is None else file.kept
        self._verified: dict[tuple[int, int], bytes] = {}  # checksums of chunks that are not delivered yet
        if file is not None:
            self.arrays = file.arrays
            self.chunks = {start: stop - start for start, stop in file.ranges}

    @property
    def kept(self) -> KeptTokens | None:
        return self._kept_at_first

    def verify(self, chunk: Verify, total_tokens: int) -> Generator[None, None, bool]:
        good = yield from super().verify(chunk, total_tokens)
        if good and chunk.checksum is not None:
            self._verified[chunk.epoch, chunk.offset] = chunk.checksum
        return good

    def deliver(self, chunk: Deliver, total_tokens: int) -> None:
        checksum = self._verified.pop((chunk.epoch, chunk.offset), None)
        if self._file is not None and checksum is not None:
            self._record(self._file, Record(chunk.offset, chunk.length, checksum))
        super().deliver(chunk, total_tokens)

    def restart(self) -> None:
        super().restart()
        self._verified.clear()
        if self._file is not None:
            self._file.discard()
            self._file = None

    def _record(self, file: KeptFile, record: Record) -> None:
        try:
            file.add(record)
        except OSError as error:  # the rows are here all the same; only a successor will not have them
            log.warning("a chunk of a kept embedding is not recorded: %s", shown(error))

    def _new_arrays(self, total_tokens: int) -> dict[str, Array]:
        """Makes the file. Called on the callback thread."""
        self._file = self._folder.make(self.owner.content_digest, total_tokens)
        return plain_arrays(self.buffers.geometry.layout, total_tokens) if self._file is None else self._file.arrays
