"""Sentences about a router that ``embferry ask`` cannot reach: what happened, and what to write instead."""

from __future__ import annotations

import contextlib
import socket
import ssl
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from embferry.trust.tls import is_plain_text, reason_of
from embferry.trust.trust import TLS_ENV

if TYPE_CHECKING:
    import httpx

PROBE_SECONDS = 5.0
"""Seconds that a server has to show that it speaks TLS."""


def reason(url: str, error: httpx.HTTPError | httpx.InvalidURL, ca: str) -> str:
    """Returns why there is no answer and what to do.

    Args:
        url: The router's base URL.
        error: Of the request.
        ca: The CA file, or "" without one.
    """
    import httpx

    failed = _tls_error(error)
    if isinstance(failed, ssl.SSLCertVerificationError):
        return f"{url}: {reason_of(failed)}. {_about_ca(ca)}"
    if failed is not None:
        advice = f". Write http:// instead: {_with_scheme(url, 'http')}" if is_plain_text(failed) else ""
        return f"{url}: TLS failed: {reason_of(failed)}{advice}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"no server responds at {url} ({error}). Start a router with: embferry serve"
    if url.lower().startswith("http:") and _speaks_tls(url):
        advice = "" if ca else f"; its CA goes with --ca FILE or {TLS_ENV[0]}"
        return f"the server at {url} speaks TLS. Write https:// instead: {_with_scheme(url, 'https')}{advice}"
    return f"the connection to {url} broke: {error or type(error).__name__}"


def _about_ca(ca: str) -> str:
    if ca:
        return f"Its certificate must be for this host and of the CA in {ca}; give another CA with --ca or {TLS_ENV[0]}"
    return f"Give the CA of the router's certificate with --ca FILE or {TLS_ENV[0]}"


def _with_scheme(url: str, scheme: str) -> str:
    return f"{scheme}:{url.partition(':')[2]}"


def _tls_error(error: BaseException | None) -> ssl.SSLError | None:
    """Returns the error of TLS that has caused another one, or None."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error


def _speaks_tls(url: str) -> bool:
    """Returns whether a server completes a handshake of TLS. It is sent nothing, so its certificate does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError, ValueError):
        address = urlsplit(url)
        with (
            socket.create_connection((address.hostname or "", address.port or 80), PROBE_SECONDS) as plain,
            context.wrap_socket(plain),
        ):
            return True
    return False
