"""Every error of the project, one small tree::

    EmbeddingTransferError
    ├── LocalProtocolError      our bug, or the caller's: the call is wrong in this state
    ├── RemoteProtocolError     the peer said something it must not say
    ├── VersionMismatch         no protocol version in common
    ├── LayoutMismatch          the peers' fields differ
    ├── TransportError          bytes could not be moved; ``retryable`` says whether to try again
    ├── CapacityError           a limit of ours is reached
    ├── IntegrityError          bytes or content are not what was announced
    ├── LeaseExpired            nothing happened for longer than was agreed
    ├── PeerGone                the peer has ended or was replaced and cannot go on
    └── Aborted                 somebody asked for the end

``code`` is stable: it appears in logs, metrics, wire messages and HTTP bodies, and is never renamed.
"""

from __future__ import annotations

from typing import ClassVar


class EmbeddingTransferError(Exception):
    """A transfer cannot go on as asked.

    :param detail: one sentence that says what happened and what to do about it.
    :param room: the ``bootstrap_room`` concerned, if one is.
    :param retryable: whether the same request may succeed when it is made again; the class's default if None.
    """

    code: ClassVar[str] = "transfer_failed"
    http_status: ClassVar[int] = 502
    default_retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, room: int | None = None, retryable: bool | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.room = room
        self.retryable = self.default_retryable if retryable is None else retryable

    def __str__(self) -> str:
        where = "" if self.room is None else f"room {self.room}: "
        return f"[{self.code}] {where}{self.detail}"


class LocalProtocolError(EmbeddingTransferError):
    """The call is wrong in this state, or a value cannot be: ours, or our caller's, to fix."""

    code = "local_protocol_error"
    http_status = 500


class RemoteProtocolError(EmbeddingTransferError):
    """The peer said something that it must not say. Upgrade or mend the peer."""

    code = "remote_protocol_error"


class VersionMismatch(EmbeddingTransferError):
    """The peers speak no protocol version in common. Upgrade the older one."""

    code = "version_mismatch"


class LayoutMismatch(EmbeddingTransferError):
    """The fields of a token differ between the peers. Serve the same model, in the same dtype, on both."""

    code = "layout_mismatch"


class TransportError(EmbeddingTransferError):
    """Bytes could not be moved. Look at the network, or configure a transport that both peers have."""

    code = "transport_error"
    default_retryable = True


class CapacityError(EmbeddingTransferError):
    """A limit of this process is reached. Ask again later, or raise the limit."""

    code = "capacity_exhausted"
    http_status = 503
    default_retryable = True


class IntegrityError(EmbeddingTransferError):
    """Bytes or content are not what was announced. Ask again; if it happens often, the memory or the network is bad."""

    code = "integrity_error"


class LeaseExpired(EmbeddingTransferError):
    """Nothing happened for longer than was agreed: a worker is overloaded or stuck."""

    code = "lease_expired"
    http_status = 504
    default_retryable = True


class PeerGone(EmbeddingTransferError):
    """The other worker has ended or cannot be reached. Ask again; another worker will take it."""

    code = "peer_gone"
    http_status = 503
    default_retryable = True


class Aborted(EmbeddingTransferError):
    """Somebody asked for the end."""

    code = "aborted"
    http_status = 499


BY_CODE: dict[str, type[EmbeddingTransferError]] = {
    cls.code: cls
    for cls in (
        EmbeddingTransferError,
        LocalProtocolError,
        RemoteProtocolError,
        VersionMismatch,
        LayoutMismatch,
        TransportError,
        CapacityError,
        IntegrityError,
        LeaseExpired,
        PeerGone,
        Aborted,
    )
}


def from_code(code: str, detail: str, *, room: int | None = None) -> EmbeddingTransferError:
    """The error a peer reported. An unknown code (a newer peer's) becomes the root class, its code kept in the text."""
    cls = BY_CODE.get(code)
    if cls is None:
        return EmbeddingTransferError(f"{detail} (the peer's code: {code})", room=room)
    return cls(detail, room=room)
