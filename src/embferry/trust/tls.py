"""TLS between the parts of a cluster: contexts made of the certificates that the cluster's own CA has signed.

TLS 1.3 only, and both ends verify each other. The files are read again for new connections when they have changed, so
that a certificate is renewed without a restart. :mod:`embferry.trust.certificates` makes the files.
"""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from embferry.protocol.errors import TlsFailed

from .private_files import is_private
from .reread import Reread


class Tls:
    """The certificate of a part, its key and the CA of the cluster. Any thread.

    Files that cannot be used any more leave the last ones valid, and are logged once a minute.

    Args:
        ca: PEM file with the certificate of the cluster's CA; two while one replaces the other.
        cert: PEM file with the certificate of this part, and of the CAs between it and ``ca``.
        key: PEM file with its private key, which only its owner may read.
        required: Whether this part makes and accepts no connection without TLS. If not, it accepts both, tells its
            peers to come without, and dials as the peer's address says: for the time in which a cluster changes over.
        checks_hosts: Whether a peer that was dialled must have a certificate for the host by which it was. If not, any
            certificate of ``ca`` will do, so that must be the cluster's own: for hosts that change all the time.

    Raises:
        TlsFailed: A file cannot be used; the text names it.
    """

    def __init__(
        self,
        ca: str | os.PathLike[str],
        cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
        *,
        required: bool = True,
        checks_hosts: bool = True,
    ) -> None:
        self.required = required
        self._cert = Path(cert)
        paths = Path(ca), self._cert, Path(key)
        self._files = Reread(
            f"the certificate in {cert}, its key and its CA", paths, lambda: _Contexts(*paths, checks_hosts)
        )

    def __repr__(self) -> str:
        return f"Tls({self._cert}, {'required' if self.required else 'not required'})"

    def accepting(self, *, clients: bool = True) -> ssl.SSLContext:
        """Returns the context for a connection that this end accepts.

        Args:
            clients: Whether the other end must have a certificate of the cluster. Not so where users come.
        """
        contexts = self._files.value()
        return contexts.accepting if clients else contexts.open_to_all

    def dialling(self) -> ssl.SSLContext:
        """Returns the context for a connection that this end makes. It checks the host, unless told otherwise."""
        return self._files.value().dialling

    def renewed(self, context: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        """Returns a context for code that keeps one for long: each new connection asks ``context`` for the real one.

        Args:
            context: Returns it.
        """
        return _Renewed(context)

    def check_host(self, host: str, what: str) -> None:
        """Checks that peers can verify this end under ``host``.

        Args:
            host: The name or IP address by which peers dial.
            what: What they dial, for the text: "the control port".

        Raises:
            TlsFailed: The certificate is not for that host.
        """
        contexts = self._files.value()
        try:
            _shake_hands(contexts.dialling, contexts.accepting, host)
        except ssl.SSLError as error:
            raise TlsFailed(
                f"peers cannot verify {what} at {host} by the certificate in {self._cert}: {reason_of(error)}; make"
                f" one for it: embferry keys cert NAME --ca DIR --host {host}"
            ) from error


class _Contexts:
    """The contexts of one state of the files.

    Raises:
        TlsFailed: A file cannot be used.
    """

    def __init__(self, ca: Path, cert: Path, key: Path, checks_hosts: bool) -> None:
        for path in (ca, cert, key):
            _check_readable(path, is_secret=path == key)
        self.dialling = _context(ssl.PROTOCOL_TLS_CLIENT, ca, cert, key)
        self.dialling.check_hostname = checks_hosts
        self.accepting = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key)
        self.open_to_all = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key)
        self.open_to_all.verify_mode = ssl.CERT_NONE
        _check_usable(ca, cert, key)


class _Renewed(ssl.SSLContext):
    """A context that makes every connection with another one. uvicorn and httpx use nothing else of it."""

    _context: Callable[[], ssl.SSLContext]

    def __new__(cls, context: Callable[[], ssl.SSLContext]) -> Self:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_CLIENT)
        made._context = context
        return made

    def wrap_bio(self, *args: Any, **options: Any) -> ssl.SSLObject:
        return self._context().wrap_bio(*args, **options)

    def wrap_socket(self, *args: Any, **options: Any) -> ssl.SSLSocket:
        return self._context().wrap_socket(*args, **options)


def dialling_with(ca: str | os.PathLike[str]) -> ssl.SSLContext:
    """Returns the context of a client that has no certificate of its own and verifies servers by a CA file.

    Raises:
        TlsFailed: The file cannot be used.
    """
    path = Path(ca)
    _check_readable(path, is_secret=False)
    context = _bare(ssl.PROTOCOL_TLS_CLIENT)
    _load_ca(context, path)
    return context


def _bare(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # a stream that is cut off is an error
    return context


def _context(protocol: int, ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    context = _bare(protocol)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection shows its certificate
    _load_ca(context, ca)
    encrypted = False

    def no_password() -> str:
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        context.load_cert_chain(cert, key, password=no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        if encrypted:
            why = f"the private key in {key} is encrypted; a part cannot ask for a password"
        elif getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            why = f"the private key in {key} does not belong to the certificate in {cert}"
        elif not _has_certificate(cert):
            why = f"{cert} holds no certificate in PEM format"
        else:
            why = f"{key} holds no private key in PEM format ({getattr(error, 'reason', None) or error})"
        raise TlsFailed(why) from None
    return context


def _load_ca(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except (ssl.SSLError, OSError, ValueError):
        raise TlsFailed(f"{ca} holds no certificate in PEM format") from None
    if not context.get_ca_certs():
        raise TlsFailed(f"the certificate in {ca} is not one of a CA")


def _has_certificate(path: Path) -> bool:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except (ssl.SSLError, OSError, ValueError):
        return False
    return True


def _check_readable(path: Path, *, is_secret: bool) -> None:
    name = "private key" if is_secret else "certificate"
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
    except OSError as error:
        raise TlsFailed(f"the {name} file {path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise TlsFailed(f"the {name} file {path} is no file")
    if is_secret and not is_private(status):
        raise TlsFailed(f"others may read the private key file {path}; do: chmod 600 {path}")


def _check_usable(ca: Path, cert: Path, key: Path) -> None:
    """Checks by a handshake in memory that the certificate is valid now, and good for either end of a connection."""
    dialling, accepting = (_context(which, ca, cert, key) for which in _BOTH)
    dialling.check_hostname = False
    try:
        _shake_hands(dialling, accepting, None)
    except ssl.SSLError as error:
        raise TlsFailed(f"the certificate in {cert} cannot be used with the CA in {ca}: {reason_of(error)}") from None


_BOTH = (ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER)


def _shake_hands(dialling: ssl.SSLContext, accepting: ssl.SSLContext, host: str | None) -> None:
    """Does a handshake in memory. Raises SSLError if it fails."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = dialling.wrap_bio(back, there, server_hostname=host)
    server = accepting.wrap_bio(there, back, server_side=True)
    for end in (client, server, client, server):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue


X509_V_ERR_CERT_SIGNATURE_FAILURE = 7
_PLAIN = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST")
_ALERTS = {
    "CERTIFICATE_REQUIRED": "the other end demands a certificate, and this end has shown none",
    "UNKNOWN_CA": "the other end does not know the CA of this end's certificate",
    "CERTIFICATE_EXPIRED": "the other end says that this end's certificate has expired",
    "CERTIFICATE_UNKNOWN": "the other end does not accept this end's certificate",
    "BAD_CERTIFICATE": "the other end does not accept this end's certificate",
    "UNSUPPORTED_CERTIFICATE": "the other end does not accept this end's certificate for this purpose",
    "PROTOCOL_VERSION": "the other end does not speak TLS 1.3, or not TLS at all",
}
TLS_ALERT = b"\x15\x03\x03\x00\x02\x02\x46"
"""A fatal alert, protocol_version: tells either end at once that the other one does not do as it does."""


def begins_tls(data: bytes | bytearray | memoryview) -> bool:
    """Returns whether bytes from a peer are the begin of a TLS handshake, or of an alert."""
    return len(data) > 1 and data[0] in (0x15, 0x16) and data[1] == 3


def fails_again(error: ssl.SSLError) -> bool:
    """Returns whether a connection has failed by what an end has or does. If not, bytes were changed or lost."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_code != X509_V_ERR_CERT_SIGNATURE_FAILURE
    reason = error.reason or ""
    return reason in (*_PLAIN, "PEER_DID_NOT_RETURN_A_CERTIFICATE") or any(
        reason.endswith(f"ALERT_{name}") for name in _ALERTS
    )


def is_plain_text(error: ssl.SSLError) -> bool:
    """Returns whether a handshake has failed because the other end does not speak TLS."""
    return error.reason in _PLAIN


def reason_of(error: ssl.SSLError) -> str:
    """Returns in words why a handshake or a connection has failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError):
        return "the stream was cut off"
    reason = error.reason or ""
    if reason in _PLAIN:
        return "the other end does not speak TLS"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "the other end has shown no certificate"
    for name, text in _ALERTS.items():
        if reason.endswith(f"ALERT_{name}"):
            return text
    return reason.lower().replace("_", " ") or str(error)
