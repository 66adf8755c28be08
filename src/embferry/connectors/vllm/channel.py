"""The channel between a scheduler and its workers on one host: packets over a Unix socket, and descriptors of memory.

On vLLM's V1 runner, the reports of a producer's worker do not reach the scheduler, and vLLM cannot fail a request in
the step that loads its embedding. So scheduler and workers have a socket of their own, in the abstract name space: it
disappears with its owner. Both ends refuse a process of another user. Memory is passed as a descriptor, so it can be
mapped even if its maker has ended, or is in another PID name space.
"""

from __future__ import annotations

import os
import socket
import struct
from array import array
from typing import Annotated, TypeVar

import msgspec

from embferry import RemoteProtocolError, TransportError

from ..shared.shape import Shape
from .host_claims import SECRET

MAX_PACKET = 16 << 10
MAX_HASH = 4096
"""Characters of a hash. It may be a name that a client gave."""
DIGEST_BYTES = 16
MAX_REASON = 2000
_CREDENTIALS = struct.Struct("=iII")  # pid, user, group: unix(7), SO_PEERCRED
_FD_BYTES = array("i").itemsize

Key = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
P = TypeVar("P")


class Publish(msgspec.Struct, frozen=True, tag=True):
    """A worker publishes an embedding; its memory comes with the packet.

    Attributes:
        digest: ``digest_of`` its rows.
        encoded: Whether the worker has just encoded it; otherwise it comes from vLLM's encoder cache.
        content: The key of what was encoded in the cache that encoders share; "" to keep it nowhere.
    """

    mm_hash: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_HASH)]
    shape: Shape
    digest: Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
    encoded: bool = True
    content: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class Enlist(msgspec.Struct, frozen=True, tag=True):
    """A rank wants to map what it is to load.

    Attributes:
        secret: By which the scheduler knows the claims of other hosts; "" if there are no other hosts.
    """

    rank: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    secret: Annotated[str, msgspec.Meta(pattern=rf"^({SECRET})?\Z")] = ""


class Map(msgspec.Struct, frozen=True, tag=True):
    """The scheduler asks a rank to map memory, which comes with the packet."""

    key: Key
    shape: Shape
    ranks: int


class Unmap(msgspec.Struct, frozen=True, tag=True):
    """The scheduler needs that memory no longer."""

    key: Key


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer to Publish (with key 0) and to Map.

    Attributes:
        error: Why it failed; empty if it did not.
    """

    key: Key
    error: Annotated[str, msgspec.Meta(max_length=MAX_REASON)] = ""


FromWorker = Publish | Enlist | Done
FromScheduler = Map | Unmap | Done

_encoder = msgspec.msgpack.Encoder()
from_worker = msgspec.msgpack.Decoder(FromWorker)
from_scheduler = msgspec.msgpack.Decoder(FromScheduler)


def address(name: str) -> bytes:
    """Returns the address of the scheduler of the engine ``name``."""
    return f"\0embferry-vllm-{name}".encode()


def new_socket() -> socket.socket:
    """Returns a socket that keeps the bounds of packets."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def connect(name: str, timeout_s: float) -> socket.socket:
    """Returns a connection to the scheduler of the engine ``name``.

    Raises:
        OSError: There is none yet, or it is gone.
        TransportError: Another user has taken its address.
    """
    sock = new_socket()
    try:
        sock.settimeout(timeout_s)
        sock.connect(address(name))
        check_user(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def own_user() -> int:
    """Returns the user of this process."""
    return os.geteuid()


def check_user(sock: socket.socket) -> None:
    """Raises TransportError if the other end of a connection is a process of another user."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(raw)
    if user != own_user():
        why = f"process {pid} of user {user} is at the other end; it must be of user {own_user()}"
        raise TransportError(why, retryable=False)


def send(sock: socket.socket, packet: msgspec.Struct, fd: int | None = None) -> None:
    """Sends a packet, with a descriptor if one is given. Raises OSError."""
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", [fd]))]
    sock.sendmsg([_encoder.encode(packet)], rights)


def receive(sock: socket.socket, decoder: msgspec.msgpack.Decoder[P]) -> tuple[P, int | None] | None:
    """Returns the next packet and its descriptor, which the caller closes. None: the connection has ended.

    Raises:
        OSError: The connection is broken, or has nothing yet.
        RemoteProtocolError: The packet is malformed. Its descriptors are closed.
    """
    space = socket.CMSG_SPACE(_FD_BYTES)
    data, rights, flags, _ = sock.recvmsg(MAX_PACKET, space, socket.MSG_CMSG_CLOEXEC)
    fds = array("i")
    for level, kind, content in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _FD_BYTES])
    try:
        if not data and not fds:
            return None
        if flags & socket.MSG_TRUNC:
            raise RemoteProtocolError(f"a packet is longer than {MAX_PACKET} bytes")
        if flags & socket.MSG_CTRUNC or len(fds) > 1:
            raise RemoteProtocolError("a packet has more than one descriptor, or none is left to take it")
        try:
            packet = decoder.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"a packet cannot be read: {error}") from error
        return packet, fds.pop() if fds else None
    finally:
        for fd in fds:
            os.close(fd)


def publish(name: str, published: Publish, fd: int, timeout_s: float) -> None:
    """Returns when the scheduler of the engine ``name`` has mapped the embedding.

    Raises:
        TransportError: The scheduler does not reply in time, or could not map the embedding.
    """
    try:
        with connect(name, timeout_s) as sock:
            send(sock, published, fd)
            answer = receive(sock, from_scheduler)
    except TimeoutError:
        raise TransportError(f"the scheduler has not taken an embedding within {timeout_s:g} s") from None
    except OSError as error:
        raise TransportError(f"the scheduler cannot be given an embedding: {error}") from error
    problem = answer[0].error if answer is not None and isinstance(answer[0], Done) else "it has ended the connection"
    if problem:
        raise TransportError(f"the scheduler could not take an embedding: {problem}")
