"""The cluster key and the certificates of candidates that measure what they cost."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from embferry.trust.trust import KEY_ENV, TLS_ENV

TRUSTS = {"": "without a key", "key": "with key", "tls": "with key and TLS"}
"""The secrets that the ends of a candidate share, in words."""


def share(trust: str, folder: str) -> None:
    """Gives this process the key and the certificate that the other end of its candidate has too.

    Args:
        trust: One of :data:`TRUSTS`.
        folder: The folder that both ends see.
    """
    if trust:
        os.environ[KEY_ENV] = hashlib.sha256(folder.encode()).hexdigest()
    if trust == "tls":
        os.environ.update(zip(TLS_ENV, map(str, _files(Path(folder) / "certificates")), strict=True))


def _files(directory: Path) -> tuple[Path, ...]:
    """Returns the files of CA, certificate and key. The end that comes first makes them."""
    from embferry.trust.certificates import make_ca, make_certificate

    directory.mkdir(exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (directory / "end.pem").exists():
            make_ca(directory)
            make_certificate("end", ["127.0.0.1"], directory)
    finally:
        os.close(lock)
    return tuple(directory / name for name in ("ca.pem", "end.pem", "end.key"))
