"""The base of every error of the package, and the errors of a transfer.

::

    EmbferryError
    ├── EngineError                 a model or a request of it: ``embferry.engine.errors``
    ├── ServeError                  the HTTP API: ``embferry.serve.errors``
    ├── PlanError                   the input of a plan: ``embferry.plan.errors``
    └── EmbeddingTransferError
        ├── LocalProtocolError      the call is wrong in this state: a bug here or in the caller
        ├── RemoteProtocolError     the peer broke the protocol
        ├── VersionMismatch         no protocol version in common
        ├── LayoutMismatch          the peers' fields differ
        ├── TransportError          bytes could not be moved; ``retryable`` says whether to try again
        │   ├── TransportStalled    a peer or a link took bytes, and nothing came of them
        │   ├── WrongKey            the peers do not know the same cluster key
        │   └── TlsFailed           the peers cannot agree on TLS, or this end's certificate cannot be used
        ├── CapacityError           a limit of this process is reached
        ├── IntegrityError          bytes or content differ from what was announced
        ├── LeaseExpired            nothing happened within a time-out
        ├── PeerGone                the peer has ended or cannot be reached
        └── Aborted                 a caller ended the transfer

``code`` is stable: it appears in logs, metrics, wire messages and HTTP bodies, and is never renamed.
"""

from __future__ import annotations

from typing import ClassVar, Self

from embferry.protocol.text import printable
from embferry.protocol.text import shown as shown


class EmbferryError(Exception):
    """Base of every error of the package.

    Args:
        detail: One sentence: what happened, and what to do about it.
        retryable: Whether the same request may succeed when it is made again. None: the default of the class.

    Attributes:
        code: A stable name of the error.
        http_status: The status of a response that reports it.
    """

    code: str = "internal_error"
    http_status: int = 500
    default_retryable: ClassVar[bool] = False

    def __init__(self, detail: str, *, retryable: bool | None = None) -> None:
        self.detail = printable(detail)
        super().__init__(self.detail)
        self.retryable = self.default_retryable if retryable is None else retryable

    def copied(self) -> Self:
        """Returns a copy to raise: one object would gather the frames of every time that it is raised.

        No constructor is called: that of a subclass may take other arguments.
        """
        copy = BaseException.__new__(type(self), *self.args)
        copy.__dict__.update(self.__dict__)
        return copy


class EmbeddingTransferError(EmbferryError):
    """A transfer cannot go on as asked.

    Args:
        detail: One sentence: what happened, and what to do about it.
        room: The ``bootstrap_room`` concerned, if any.
        retryable: Whether the same request may succeed when it is made again. None: the default of the class.
    """

    code = "transfer_failed"
    http_status = 502

    def __init__(self, detail: str, *, room: int | None = None, retryable: bool | None = None) -> None:
        super().__init__(detail, retryable=retryable)
        self.room = room

    def __str__(self) -> str:
        where = "" if self.room is None else f"room {self.room}: "
        return f"[{self.code}] {where}{self.detail}"


class LocalProtocolError(EmbeddingTransferError):
    """The call is wrong in this state, or a value is impossible. Fix the caller, or report a bug."""

    code = "local_protocol_error"
    http_status = 500


class RemoteProtocolError(EmbeddingTransferError):
    """The peer broke the protocol. Upgrade or repair the peer."""

    code = "remote_protocol_error"


class VersionMismatch(EmbeddingTransferError):
    """The peers have no protocol version in common. Upgrade the older one."""

    code = "version_mismatch"


class LayoutMismatch(EmbeddingTransferError):
    """The fields of a token differ between the peers. Serve the same model, in the same dtype, on both."""

    code = "layout_mismatch"


class TransportError(EmbeddingTransferError):
    """Bytes could not be moved. Look at the network, or configure a transport that both peers have."""

    code = "transport_error"
    default_retryable = True


class TransportStalled(TransportError):
    """A peer or a link took bytes, and nothing came of them. The transfer goes on over the next transport at once."""

    code = "transport_stalled"


class WrongKey(TransportError):
    """The peers do not know the same cluster key, or only one has a key. Give both the same key file."""

    code = "wrong_key"
    default_retryable = False


class TlsFailed(TransportError):
    """The peers cannot agree on TLS, or this end's certificate cannot be used. Give both certificates of one CA."""

    code = "tls_failed"
    default_retryable = False


class CapacityError(EmbeddingTransferError):
    """A limit of this process is reached. Ask again later, or raise the limit."""

    code = "capacity_exhausted"
    http_status = 503
    default_retryable = True


class IntegrityError(EmbeddingTransferError):
    """Bytes or content differ from what was announced. Ask again; if it recurs, check memory and network."""

    code = "integrity_error"


class LeaseExpired(EmbeddingTransferError):
    """Nothing happened within a time-out: a worker is overloaded or stuck."""

    code = "lease_expired"
    http_status = 504
    default_retryable = True


class PeerGone(EmbeddingTransferError):
    """The other worker has ended or cannot be reached. Ask again: another worker takes the request."""

    code = "peer_gone"
    http_status = 503
    default_retryable = True


class Aborted(EmbeddingTransferError):
    """A caller ended the transfer."""

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
        TransportStalled,
        WrongKey,
        TlsFailed,
        CapacityError,
        IntegrityError,
        LeaseExpired,
        PeerGone,
        Aborted,
    )
}


def reason_of(error: BaseException) -> str:
    """Returns what happened, for the text of another error: the detail, the text, or the type if there is no text."""
    return error.detail if isinstance(error, EmbferryError) else str(error) or type(error).__name__


def from_code(code: str, detail: str, *, room: int | None = None) -> EmbeddingTransferError:
    """Returns the error that a peer reported. An unknown code becomes the root class; the text then names the code."""
    cls = BY_CODE.get(code)
    if cls is None:
        return EmbeddingTransferError(f"{detail} (the peer's code: {code})", room=room)
    return cls(detail, room=room)
