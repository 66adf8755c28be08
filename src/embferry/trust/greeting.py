"""The greeting: the first bytes of every byte stream between parts, in which both ends prove that they know the key.

Pure: bytes in, bytes out. Every message has a fixed length, and nothing else is read before the greeting is done.

======== ======================================== ==========================================================
from     bytes                                    meaning
======== ======================================== ==========================================================
both     ``EMBg`` version(1) flags(1) channel(1)  hello, sent at once. Flag 1: this end has a key. The nonce is
         role(1) nonce(32)                        random and new for each connection
dialer   proof(32) proof(32)                      with keys: one under each of its keys, the current one first;
                                                  with one key, the same twice
acceptor proof(32)                                with keys, once a proof of the dialer is right: under the key of
                                                  that one. 32 zeros: none is right
======== ======================================== ==========================================================

A proof is HMAC-SHA-256 under the cluster key over a label, the role of the prover, the dialer's hello and the
acceptor's hello (:meth:`.keys.Key.mac`). The nonces in it are fresh, so a recording is of no use; the role is in it, so
an end's own proof cannot be returned to it; version, flags and channel are in it, so they cannot be changed on the way.

The dialer proves under both of its keys, so that a new key may come to the parts one after the other: the two ends go
on as long as they have one in common.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from enum import IntEnum

from embferry.protocol.errors import LocalProtocolError, TlsFailed, TransportError, WrongKey

from .keys import PROOF_BYTES, Key
from .tls import TLS_ALERT, begins_tls

MAGIC, VERSION = b"EMBg", 1
HAS_KEY = 1
NONCE_BYTES = 32
LABEL = b"embferry greeting"
REFUSED = bytes(PROOF_BYTES)
"""In place of the acceptor's proof."""

HELLO = struct.Struct(f"!4sBBBB{NONCE_BYTES}s")
PROOFS_BYTES = 2 * PROOF_BYTES


class Channel(IntEnum):
    """The purpose of a stream. A proof for one is worth nothing on another."""

    CONTROL = 1
    TCP = 2
    NIXL = 3
    MOONCAKE = 4


class Role(IntEnum):
    """Which end of the connection."""

    DIALER = 1
    ACCEPTOR = 2

    @property
    def other(self) -> Role:
        return Role.ACCEPTOR if self is Role.DIALER else Role.DIALER


class Greeting:
    """One end of a greeting. After an exception, the connection is to be closed.

    Args:
        role: Of this end.
        channel: What the stream is for.
        keys: The valid keys, the current one first; none: the peer must have none either.
        nonce: 32 random bytes, never used before.

    Attributes:
        done: Whether the greeting is over, and the peer is one of the cluster.
        wanted: How many more bytes of the peer belong to it: no more than these may be read. 0 once it is done.
        farewell: Bytes to send before the connection is closed, after an exception.
    """

    def __init__(self, role: Role, channel: Channel, keys: Sequence[Key], nonce: bytes) -> None:
        self._role, self._channel, self._keys = role, channel, tuple(keys)
        self.hello = HELLO.pack(MAGIC, VERSION, HAS_KEY if keys else 0, channel, role, nonce)
        """The bytes to send first, at once."""
        self._their_hello: bytes | None = None
        self._held = bytearray()
        self.done = False
        self.wanted = HELLO.size
        self.farewell = b""

    def receive(self, data: bytes) -> bytes:
        """Takes one byte of the peer, or more, up to ``wanted``. Returns what to send.

        Raises:
            WrongKey: The peer does not know the key, or only one end has one.
            TlsFailed: The peer speaks TLS. This end would not see that if it did, too.
            TransportError: The peer is none of embferry, or of another version, or not for this channel.
        """
        if not 1 <= len(data) <= self.wanted:
            raise LocalProtocolError(f"{len(data)} bytes for a greeting that lacks {self.wanted}")
        self._held += data
        self.wanted -= len(data)
        if self._their_hello is None and not MAGIC.startswith(bytes(self._held[: len(MAGIC)])):
            if begins_tls(self._held):
                self.farewell = TLS_ALERT
                raise TlsFailed("the other end of the connection demands TLS, and this end does not use it")
            raise TransportError("the other end of the connection does not greet as a part of embferry does")
        if self.wanted:
            return b""
        message, self._held = bytes(self._held), bytearray()
        if self._their_hello is None:
            return self._on_hello(message)
        return self._on_answer(message) if self._role is Role.DIALER else self._on_proofs(message)

    def _on_hello(self, hello: bytes) -> bytes:
        check_hello(hello, self._role, self._channel, has_key=bool(self._keys))
        self._their_hello = hello
        if not self._keys:
            self.done = True
            return b""
        if self._role is Role.ACCEPTOR:
            self.wanted = PROOFS_BYTES
            return b""
        self.wanted = PROOF_BYTES
        return self._proof(self._keys[0], Role.DIALER) + self._proof(self._keys[-1], Role.DIALER)

    def _on_proofs(self, proofs: bytes) -> bytes:
        key = self._proven_key((proofs[:PROOF_BYTES], proofs[PROOF_BYTES:]), Role.DIALER)
        if key is None:
            self.farewell = REFUSED
            raise WrongKey("the peer does not know this cluster's key")
        self.done = True
        return self._proof(key, Role.ACCEPTOR)

    def _on_answer(self, answer: bytes) -> bytes:
        if answer == REFUSED:
            raise WrongKey("the peer has another cluster key than this end; give both the same key file")
        if self._proven_key((answer,), Role.ACCEPTOR) is None:
            raise WrongKey("the peer does not know this cluster's key, although it has answered")
        self.done = True
        return b""

    def _proven_key(self, proofs: Sequence[bytes], prover: Role) -> Key | None:
        """Returns the key of the first proof that is right. Takes the same time for all that are wrong."""
        found: Key | None = None
        for proof in proofs:
            for key in self._keys:
                if hmac.compare_digest(proof, self._proof(key, prover)) and found is None:
                    found = key
        return found

    def _proof(self, key: Key, prover: Role) -> bytes:
        assert self._their_hello is not None
        mine, theirs = self.hello, self._their_hello
        hellos = (mine, theirs) if self._role is Role.DIALER else (theirs, mine)
        return proof(key, prover, *hellos)


def proof(key: Key, prover: Role, dialer_hello: bytes, acceptor_hello: bytes) -> bytes:
    """Returns the proof of ``prover`` under ``key`` that it has seen both hellos."""
    return key.mac(LABEL, bytes([prover]), dialer_hello, acceptor_hello)


def check_hello(hello: bytes, role: Role, channel: Channel, *, has_key: bool) -> None:
    """Checks the peer's hello against this end's role and channel, and whether this end has a key.

    Raises:
        WrongKey: Only one end has a key.
        TransportError: The version, the channel or the role is not the right one.
    """
    _, version, flags, their_channel, their_role, _ = HELLO.unpack(hello)
    if version != VERSION:
        raise TransportError(f"the peer greets in version {version}, this end in {VERSION}", retryable=False)
    if their_role != role.other:
        raise TransportError("the peer greets as this end does: the connection leads back to where it came from")
    if their_channel != channel:
        raise TransportError(f"the peer is not at the other end of a {channel.name.lower()} connection")
    if flags & ~HAS_KEY:
        raise TransportError(f"the peer's greeting has unknown flags {flags:#x}", retryable=False)
    if has_key and not flags & HAS_KEY:
        raise WrongKey("this end has a cluster key and the peer has none; give it EMBFERRY_CLUSTER_KEY_FILE")
    if flags & HAS_KEY and not has_key:
        raise WrongKey("the peer has a cluster key and this end has none; set EMBFERRY_CLUSTER_KEY_FILE here")
