"""Sentences about a question of ``embferry ask`` without an answer: what happened, and what to write instead."""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from embferry.protocol.text import printable
from embferry.trust.tls import is_plain_text, reason_of
from embferry.trust.trust import TLS_ENV

if TYPE_CHECKING:
    import httpx

PROBE_SECONDS = 5.0
"""Seconds that a server has to show that it speaks TLS."""


MAX_NAME = 200
"""Characters of a file's name or a URL in a sentence."""
_PART = re.compile(r"messages\[0\]\.content\[(\d+)\]")
"""The place of a part, in the only message of a question."""


def sentence(told: Any, media: Sequence[str]) -> str:
    """Returns what an error of a router says, with the file that it is about; "" if it is no error of a router.

    Args:
        told: the JSON that the server has sent. An error of OpenAI's API has a type, those of other servers have none.
        media: the words of the files and URLs, which are the first parts of the message.
    """
    error = told.get("error", told) if isinstance(told, dict) else None
    if not isinstance(error, dict) or not error.get("message") or "type" not in error:
        return ""
    place = _PART.match(str(error.get("param")))
    number = int(place[1]) if place else len(media)
    text = str(error["message"])
    about = f"{printable(media[number], MAX_NAME)}: " if number < len(media) else ""
    return f"{about}{text}{_about_file_urls(media)}"


def _about_file_urls(media: Sequence[str]) -> str:
    urls = [word for word in media if word.lower().startswith("file:")]
    return f" ({urls[0]} is a file of the router's machine; for one of this machine, leave out file://)" if urls else ""


def no_router(response: httpx.Response) -> str:
    """Returns the sentence about a server that answers HTTP, but not as OpenAI's API does."""
    url = response.url
    base = f"{url.scheme}://{url.netloc.decode()}"
    return f"the server at {base} is no router: it has status {response.status_code} for {url.path}"


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
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"--url {url} is wrong: {error}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"no server responds at {url} ({error}). Start a router with: embferry serve"
    if url.lower().startswith("http:") and _speaks_tls(url):
        advice = "" if ca else f"; its CA goes with --ca FILE or {TLS_ENV[0]}"
        return f"the server at {url} speaks TLS. Write https:// instead: {_with_scheme(url, 'https')}{advice}"
    if isinstance(error, httpx.RemoteProtocolError) and not any(
        word in str(error) for word in ("disconnect", "closed")
    ):
        return f"the server at {url} is no router: it speaks no HTTP ({error})"
    if isinstance(error, httpx.RemoteProtocolError) and "without sending a response" in str(error):
        return f"the server at {url} closed the connection without an answer; is it a router?"
    if isinstance(error, httpx.ReadTimeout):
        return f"the server at {url} does not answer; is it a router?"
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
