"""A CA and certificates for tests. Needs cryptography."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from embferry.trust.certificates import make_ca, make_certificate
from embferry.trust.tls import Tls

LONG_AGO = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Authority:
    """The directory of a CA.

    Attributes:
        path: Holds ``ca.pem`` and ``ca.key``, and the certificates made.
    """

    path: Path

    @classmethod
    def make(cls, path: Path) -> Authority:
        make_ca(path)
        return cls(path)

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    def files(self, name: str, *hosts: str, expired: bool = False) -> tuple[Path, Path, Path]:
        """Makes a certificate. Returns the files of CA, certificate and key."""
        cert, key = make_certificate(name, hosts or HOSTS, self.path, now=LONG_AGO if expired else None)
        return self.ca, cert, key

    def tls(self, name: str, *hosts: str, required: bool = True) -> Tls:
        return Tls(*self.files(name, *hosts), required=required)
