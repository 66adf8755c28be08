"""Makes a cluster's own CA, and certificates for its parts. Needs ``cryptography``, the extra ``embferry[tls]``.

Imported on demand: what uses certificates needs only :mod:`embferry.trust.tls`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from embferry.protocol.errors import LocalProtocolError

CA_CERT, CA_KEY = "ca.pem", "ca.key"
EARLIER = datetime.timedelta(minutes=5)
"""Certificates are valid from this time before now on, because clocks differ."""


def make_ca(directory: Path, *, days: int = 3650) -> tuple[Path, Path]:
    """Makes a CA and writes ``ca.pem`` and ``ca.key`` into ``directory``, which is made if it is absent.

    Returns:
        The files of certificate and key.

    Raises:
        LocalProtocolError: A file is there already, or cannot be written.
    """
    cert_path, key_path = directory / CA_CERT, directory / CA_KEY
    _refuse_present(cert_path, key_path)
    key = ec.generate_private_key(ec.SECP256R1())
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"embferry cluster CA {serial:040x}"[:64])])
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _builder(name, name, key, serial, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(own, critical=False)
        .sign(key, hashes.SHA256())
    )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise LocalProtocolError(f"{directory} cannot be made: {error.strerror}") from error
    _write(key_path, _pem(key), 0o600)
    _write(cert_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return cert_path, key_path


def make_certificate(
    name: str,
    hosts: Sequence[str],
    ca: Path,
    *,
    days: int = 365,
    directory: Path | None = None,
    now: datetime.datetime | None = None,
) -> tuple[Path, Path]:
    """Makes a certificate for a part of the cluster, for either end of a connection.

    Args:
        name: Name of the files, and of the part in logs.
        hosts: The names and IP addresses by which peers dial the part.
        ca: The directory of the CA.
        days: How long it is valid.
        directory: Where to write ``NAME.pem`` and ``NAME.key``. None: beside the CA.
        now: When it becomes valid. None: now.

    Returns:
        The files of certificate and key.

    Raises:
        LocalProtocolError: A file is there already, cannot be read or written, or a value is wrong.
    """
    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name.startswith("."):
        raise LocalProtocolError(f"{name!r} cannot be the name of a certificate: letters, digits, '-', '_' and '.'")
    if name in (Path(CA_CERT).stem, CA_CERT, CA_KEY):
        raise LocalProtocolError(f"{name!r} is the name of the CA's own files")
    if not hosts:
        raise LocalProtocolError("a certificate needs a host, the name or address by which peers dial the part")
    cert_path, key_path = ((directory or ca) / f"{name}{suffix}" for suffix in (".pem", ".key"))
    _refuse_present(cert_path, key_path)
    ca_certificate, ca_key = _load(ca)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    either = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    certificate = (
        _builder(subject, ca_certificate.subject, key, x509.random_serial_number(), days, now)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(either, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(authority, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _write(key_path, _pem(key), 0o600)
    _write(cert_path, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    return cert_path, key_path


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    serial: int,
    days: int,
    now: datetime.datetime | None = None,
) -> x509.CertificateBuilder:
    if not 1 <= days <= 36500:
        raise LocalProtocolError(f"a certificate is valid for 1 to 36500 days, not {days}")
    now = datetime.datetime.now(datetime.UTC) if now is None else now
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.rstrip("."))
    except ValueError:
        raise LocalProtocolError(f"{host!r} is neither an IP address nor a host name in ASCII") from None


def _load(ca: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        certificate = x509.load_pem_x509_certificate((ca / CA_CERT).read_bytes())
        key = serialization.load_pem_private_key((ca / CA_KEY).read_bytes(), None)
    except OSError as error:
        raise LocalProtocolError(
            f"{error.filename} cannot be read: {error.strerror}; embferry keys ca {ca} makes a CA"
        ) from error
    except (ValueError, TypeError) as error:
        raise LocalProtocolError(f"{ca} holds no CA of embferry keys ca: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise LocalProtocolError(f"the key in {ca / CA_KEY} does not belong to the certificate in {ca / CA_CERT}")
    return certificate, key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pem: bytes = key.private_bytes(encoding, form, serialization.NoEncryption())
    return pem


def _refuse_present(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise LocalProtocolError(f"{path} is there already; choose another name, or move it away")


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # the umask may have taken rights away
            file.write(data)
    except FileExistsError:
        raise LocalProtocolError(f"{path} is there already; choose another name, or move it away") from None
    except OSError as error:
        raise LocalProtocolError(f"{path} cannot be written: {error.strerror}") from error
