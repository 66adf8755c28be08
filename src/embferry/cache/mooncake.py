"""A Mooncake store of embeddings: memory of several machines behind one master.

Facts about its client (0.3.13) that shape this file:

- Starting it without a master takes a minute and a half, during which no thread of the process runs. So it starts with
  the process, before any request, and only once the master accepts connections.
- Its other calls let the process run, but each takes 30 s while the master does not respond.
- A call after ``close`` crashes the process, and so does one that is under way meanwhile.
- An object that was read lately is removed only with ``force``. ``put`` of a key that exists changes nothing and
  returns success.
- It neither authenticates nor encrypts: every program that reaches the master can read and replace what is kept.
"""

from __future__ import annotations

import errno
import importlib
import os
import socket
from dataclasses import dataclass
from typing import Any

import numpy as np

from .contract import Accept, TooLarge, verify
from .entry import MAX_HEAD, Damaged, Entry, checked, parse

PREFIX = "embferry/"
REACH_S = 3.0
"""How long the master may take to accept a connection."""
P2P = "P2PHANDSHAKE"
_OBJECT_NOT_FOUND = -704


@dataclass(frozen=True, slots=True)
class MooncakeSettings:
    """Where a store is, and how this process takes part.

    Attributes:
        master: ``host:port`` of its master.
        host: The address of this host that other members reach it at.
        protocol: ``tcp`` or ``rdma``.
        device: Names of RDMA devices, comma separated; empty: all.
        metadata_server: :data:`P2P`, or a server the engine knows, such as ``http://10.0.0.1:8080/metadata``.
        segment_bytes: Memory of this process that the store may use. It is lost with the process.
        buffer_bytes: Memory for the client's own transfers, as large as the largest embeddings under way together.
    """

    master: str
    host: str
    protocol: str = "tcp"
    device: str = ""
    metadata_server: str = P2P
    segment_bytes: int = 0
    buffer_bytes: int = 512 << 20


class MooncakeStore:
    """The store, as a :class:`Store`. Any thread may call the methods; :meth:`close` only while no other call runs."""

    def __init__(self, settings: MooncakeSettings) -> None:
        """Joins the store.

        Raises:
            ImportError: The client is not installed.
            OSError: The master is not in reach, or refuses.
        """
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # without it every call is logged; errors are
        make = importlib.import_module("mooncake.store").MooncakeDistributedStore
        self._buffer_bytes = settings.buffer_bytes
        host, _, port = settings.master.rpartition(":")
        socket.create_connection((host, int(port)), REACH_S).close()
        self._client: Any = make()
        code = self._client.setup(
            settings.host,
            settings.metadata_server,
            settings.segment_bytes,
            settings.buffer_bytes,
            settings.protocol,
            settings.device,
            settings.master,
        )
        if code:
            raise OSError(errno.ENOTCONN, f"the Mooncake store at {settings.master} cannot be joined ({code})")

    def read(self, key: str, accept: Accept) -> Entry | None:
        """See :meth:`Store.read`."""
        client, name = self._client, PREFIX + key
        size = client.get_size(name)
        if size == _OBJECT_NOT_FOUND:
            return None
        found = client.get_buffer(name) if size > 0 else None
        if found is None:
            raise OSError(errno.EIO, f"the Mooncake store has not read an embedding ({size})")
        try:
            return _copied(memoryview(found).cast("B"), key, accept)
        except Damaged:
            client.remove(name, True)
            raise

    def write(self, entry: Entry, data: memoryview) -> int:
        """See :meth:`Store.write`."""
        head = checked(entry).head()
        size = len(head) + entry.nbytes
        if size > self._buffer_bytes:
            raise TooLarge(f"an embedding of {size} bytes; the client's buffer has {self._buffer_bytes}")
        client, name = self._client, PREFIX + entry.key
        if client.is_exist(name) == 1:
            return 0
        if code := client.put_parts(name, head, data):
            raise OSError(errno.EIO, f"the Mooncake store has not taken an embedding ({code})")
        return size

    def close(self) -> None:
        """See :meth:`Store.close`. It takes seconds."""
        client, self._client = self._client, None
        if client is not None:
            client.close()


def _copied(found: memoryview, key: str, accept: Accept) -> Entry:
    entry, length = parse(bytes(found[:MAX_HEAD]), len(found))
    if entry.key != key:
        raise Damaged("its head has another key than its name")
    room = accept(entry)
    np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(found[length:], np.uint8))  # lets other threads run
    verify(entry, room)
    return entry
