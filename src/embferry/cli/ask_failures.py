"""Sentences about a question of ``embferry ask`` without an answer: what happened, and what to write instead."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import ssl
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from embferry.protocol.text import printable
from embferry.serve.config import RouterSettings
from embferry.serve.config_load import env_name
from embferry.serve.media.formats import READ
from embferry.trust.tls import is_plain_text, reason_of
from embferry.trust.trust import TLS_ENV

if TYPE_CHECKING:
    import httpx

E = TypeVar("E", bound=BaseException)

PROBE_SECONDS = 5.0
"""Seconds that a server has to show that it speaks TLS."""


API_KEY_ENV = env_name(("router", "api_key"))
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
    text = _with_all_formats(str(error["message"]))
    about = f"{printable(media[number], MAX_NAME)}: " if number < len(media) else ""
    return f"{about}{text}{_about_file_urls(media)}"


def _with_all_formats(text: str) -> str:
    """Returns the error about a format with the other list too: a file of no known format is sent as one of both."""
    other = next((READ[kind] for kind in READ if not text.endswith(READ[kind])), "")
    return f"{text}; {other}" if text.endswith(tuple(READ.values())) else text


def about_key(*, is_given: bool) -> str:
    """Returns the sentence about a router that refuses the API key, or asks for one."""
    if is_given:
        return f"the router does not know the API key in {API_KEY_ENV}; set it to another one"
    return f"the router asks for an API key; set {API_KEY_ENV} to it"


def _about_file_urls(media: Sequence[str]) -> str:
    urls = [word for word in media if word.lower().startswith("file:")]
    return f" ({urls[0]} is a file of the router's machine; for one of this machine, leave out file://)" if urls else ""


def no_router(response: httpx.Response) -> str:
    """Returns the sentence about a server that answers HTTP, but not as OpenAI's API does."""
    url = response.url
    base = f"{url.scheme}://{url.netloc.decode()}"
    why = f"it has status {response.status_code} for {url.path}"
    return f"the server at {base} is no router: {why}{_about_port(base)}"


def reason(url: str, error: httpx.HTTPError | httpx.InvalidURL, ca: str) -> str:
    """Returns why there is no answer and what to do.

    Args:
        url: The router's base URL.
        error: Of the request.
        ca: The CA file, or "" without one.
    """
    import httpx

    failed = _caused_by(error, ssl.SSLError)
    if isinstance(failed, ssl.SSLCertVerificationError):
        return f"{url}: {reason_of(failed)}. {_about_ca(ca)}"
    if failed is not None:
        advice = f". Write http:// instead: {_with_scheme(url, 'http')}" if is_plain_text(failed) else ""
        return f"{url}: TLS failed: {reason_of(failed)}{advice}"
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"--url {url} is wrong: {error}"
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        hint = "" if _caused_by(error, socket.gaierror) else _about_port(url)
        return f"no server responds at {url} ({_of_system(error)}){hint}. Start a router with: embferry serve"
    if url.lower().startswith("http:") and _speaks_tls(url):
        advice = "" if ca else f"; its CA goes with --ca FILE or {TLS_ENV[0]}"
        return f"the server at {url} speaks TLS. Write https:// instead: {_with_scheme(url, 'https')}{advice}"
    if isinstance(error, httpx.RemoteProtocolError) and not any(
        word in str(error) for word in ("disconnect", "closed")
    ):
        return f"the server at {url} is no router: it speaks no HTTP ({error}){_about_port(url)}"
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


def _about_port(url: str) -> str:
    """Returns the hint for a URL without a port, which is that of web pages then; "" for one with a port."""
    parts = urlsplit(url)
    if parts.port is not None:
        return ""
    usual = RouterSettings().port
    full = parts._replace(netloc=f"{parts.netloc}:{usual}").geturl()
    return (
        f"; without a port this is {443 if parts.scheme.lower() == 'https' else 80}, and a router's is {usual}: {full}"
    )


def _of_system(error: BaseException) -> str:
    """Returns the text of the system's error behind another one, which asyncio's clients put into general words."""
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno is not None):
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if isinstance(cause, OSError) else None
    if number is None:
        return str(error)
    return f"[Errno {number}] {os.strerror(number)}" if number > 0 else str(cause)  # those of names are below 0


def _caused_by(error: BaseException | None, kind: type[E]) -> E | None:
    """Returns the error of this kind that has caused another one, or is it; None if there is none."""
    while error is not None and not isinstance(error, kind):
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
