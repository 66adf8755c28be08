"""The trust of a part in its peers: one object for everything that listens or dials."""

from __future__ import annotations

import os
import secrets
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from embferry.protocol.errors import LocalProtocolError, TlsFailed

from .greeting import NONCE_BYTES, Channel, Greeting, Role
from .keys import ClusterKeys
from .policy import check_listening
from .tls import Tls

KEY_ENV = "EMBFERRY_CLUSTER_KEY"
KEY_FILE_ENV = "EMBFERRY_CLUSTER_KEY_FILE"
INSECURE_ENV = "EMBFERRY_INSECURE"
TLS_ENV = ("EMBFERRY_TLS_CA", "EMBFERRY_TLS_CERT", "EMBFERRY_TLS_KEY")
TLS_REQUIRED_ENV = "EMBFERRY_TLS_REQUIRED"
TLS_HOSTS_ENV = "EMBFERRY_TLS_CHECK_HOSTS"
EVERYWHERE = ("0.0.0.0", "::", "[::]", "")
"""Hosts to listen on that no peer dials."""
_YES, _NO = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys that peers must know, where a part may listen without any, and its certificate.

    Attributes:
        keys: Peers must know one of them. None: there are none, and peers that have some are refused.
        insecure: Whether the part may listen where strangers can reach it although it has no keys.
        tls: The part's certificate. None: its connections are not encrypted.
    """

    keys: ClusterKeys | None = None
    insecure: bool = False
    tls: Tls | None = None

    @classmethod
    def of_environment(
        cls,
        environ: Mapping[str, str] | None = None,
        *,
        key_file: str | os.PathLike[str] | None = None,
        insecure: bool = False,
    ) -> Trust:
        """Returns what the environment says; an empty variable counts as not set.

        Args:
            key_file: A key file to use in place of the one that the environment names.
            insecure: Whether strangers may be let in, even if the environment does not say so.
            environ: ``EMBFERRY_CLUSTER_KEY`` (one key, two separated by a comma, or the content of a key file) or
                ``EMBFERRY_CLUSTER_KEY_FILE``, and ``EMBFERRY_INSECURE``; ``EMBFERRY_TLS_CA``, ``EMBFERRY_TLS_CERT`` and
                ``EMBFERRY_TLS_KEY``, the files of :class:`.tls.Tls`, ``EMBFERRY_TLS_REQUIRED`` and
                ``EMBFERRY_TLS_CHECK_HOSTS``. None: the environment of this process.

        Raises:
            LocalProtocolError: A value is wrong, both of the keys are given, or only a part of the TLS files.
            TlsFailed: A TLS file cannot be used.
        """
        environ = os.environ if environ is None else environ
        text, path = environ.get(KEY_ENV, ""), str(key_file or environ.get(KEY_FILE_ENV, ""))
        if text and path:
            raise LocalProtocolError(f"{KEY_ENV} and {KEY_FILE_ENV} are both set; keep one of them")
        keys = ClusterKeys.of_text(text, KEY_ENV) if text else ClusterKeys.of_file(path) if path else None
        is_insecure = insecure or _is_on(environ, INSECURE_ENV, default=False)
        return cls(keys, is_insecure, _tls_of(environ))

    @classmethod
    def or_environment(cls, trust: Trust | None) -> Trust:
        """Returns ``trust``, or what the environment says if it is None. What constructors do with their argument."""
        return cls.of_environment() if trust is None else trust

    @property
    def scheme(self) -> str:
        """The scheme of the URLs at which this part answers."""
        return "https" if self.demands_tls else "http"

    @property
    def demands_tls(self) -> bool:
        """Whether this part makes and accepts no connection without TLS."""
        return self.tls is not None and self.tls.required

    def check_host(self, host: str, what: str) -> None:
        """Checks that peers can verify this part under ``host``, if it has a certificate: :meth:`.tls.Tls.check_host`.

        Raises:
            TlsFailed: They cannot.
        """
        if self.tls is not None and host not in EVERYWHERE:
            self.tls.check_host(host.strip("[]"), what)

    def tls_for(self, demands_tls: bool) -> Tls | None:
        """Returns the certificate for a connection that this part makes, or None for one without TLS.

        Args:
            demands_tls: Whether the peer accepts no connection without TLS.

        Raises:
            TlsFailed: The peer demands TLS, and this part has no certificate.
        """
        if demands_tls and self.tls is None:
            raise TlsFailed(f"the peer demands TLS, and this end has no certificate: set {', '.join(TLS_ENV)}")
        return self.tls if demands_tls or self.demands_tls else None

    def http_certificate(self, *, clients: bool = True) -> ssl.SSLContext | None:
        """Returns the lasting context of an HTTP server that demands TLS; None if it does not.

        Args:
            clients: Whether clients must have a certificate of the cluster.
        """
        tls = self.tls
        if tls is None or not tls.required:
            return None
        return tls.renewed(lambda: tls.accepting(clients=clients))

    def check_url(self, url: str, what: str) -> None:
        """Checks that this part can ask a server at ``url``, and may.

        Args:
            url: The server's.
            what: What it is, for the text: "the bootstrap server's URL".

        Raises:
            LocalProtocolError: It needs TLS and there is no certificate, or there is one and TLS is required.
        """
        if url.startswith("https:") and self.tls is None:
            raise LocalProtocolError(f"{what}, {url}, needs a certificate: set {', '.join(TLS_ENV)}")
        if url.startswith("http:") and self.demands_tls:
            raise LocalProtocolError(f"{what}, {url}, must begin with https://, because TLS is required here")

    def check_listening(self, host: str, what: str) -> None:
        """Checks that ``what`` may listen on ``host``: on a loopback address, or with keys, or ``insecure``.

        Args:
            host: The address.
            what: What listens, for the text: "the control port".

        Raises:
            LocalProtocolError: Strangers could reach it, and nothing keeps them out. The text says what to do.
        """
        check_listening(host, what, has_key=self.keys is not None, insecure=self.insecure)

    def greeting(self, role: Role, channel: Channel) -> Greeting:
        """Returns the greeting of a new connection, with the keys that are valid now. Any thread."""
        keys = () if self.keys is None else self.keys.accepted()
        return Greeting(role, channel, keys, secrets.token_bytes(NONCE_BYTES))


def _is_on(environ: Mapping[str, str], name: str, *, default: bool) -> bool:
    said = environ.get(name, "").strip().lower()
    if said not in _YES + _NO:
        raise LocalProtocolError(f"{name} is 1 or 0, not {said[:20]!r}")
    return said in _YES if said else default


def _tls_of(environ: Mapping[str, str]) -> Tls | None:
    paths = [environ.get(name, "") for name in TLS_ENV]
    if not any(paths):
        return None
    if missing := [name for name, path in zip(TLS_ENV, paths, strict=True) if not path]:
        verb = "is" if len(missing) == 1 else "are"
        raise LocalProtocolError(f"TLS needs all of {', '.join(TLS_ENV)}; {' and '.join(missing)} {verb} not set")
    required, checks_hosts = (_is_on(environ, name, default=True) for name in (TLS_REQUIRED_ENV, TLS_HOSTS_ENV))
    return _tls(*paths, required=required, checks_hosts=checks_hosts)


@lru_cache(maxsize=8)
def _tls(ca: str, cert: str, key: str, *, required: bool, checks_hosts: bool) -> Tls:
    """Reads the files once a process; it is asked for by everything that listens or dials."""
    return Tls(ca, cert, key, required=required, checks_hosts=checks_hosts)
