"""The first frame of a connection, in each direction: a hello with the versions of this framing that are spoken.

A connection carries nothing else until both hellos have come.
"""

from __future__ import annotations

import struct

from embferry.protocol.errors import RemoteProtocolError, VersionMismatch

MAGIC = b"EMBFERRY"
VERSIONS = (1, 1)
"""The oldest and the newest version spoken here."""
MAX_HELLO = 256
"""Bytes of a hello. A later version may append to it."""

_HELLO = struct.Struct("!8sHH")


class Handshake:
    """One end's handshake.

    Attributes:
        done: Whether frames may follow.
        version: The version agreed on, then.
    """

    def __init__(self) -> None:
        self.done = False
        self.version = 0

    def first(self) -> bytes:
        """Returns the hello to send at once."""
        return _HELLO.pack(MAGIC, *VERSIONS)

    def receive(self, payload: bytes) -> None:
        """Handles the peer's hello.

        Raises:
            RemoteProtocolError: The peer speaks another protocol.
            VersionMismatch: No version in common.
        """
        if len(payload) < _HELLO.size or not payload.startswith(MAGIC):
            raise RemoteProtocolError("the other end of the connection is no control plane of embferry")
        _, oldest, newest = _HELLO.unpack_from(payload)
        self.version = min(newest, VERSIONS[1])
        if self.version < max(oldest, VERSIONS[0]):
            raise VersionMismatch(
                f"the peer speaks versions {oldest} to {newest} of the control plane, this end {VERSIONS}"
            )
        self.done = True
