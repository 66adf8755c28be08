"""One question to a part of the cluster: is it well? Imports little, because health checks run every few seconds."""

from __future__ import annotations

import http.client
import ssl
import sys
from urllib.parse import urlsplit

from embferry.protocol.errors import EmbferryError
from embferry.protocol.text import printable
from embferry.trust.policy import is_loopback
from embferry.trust.trust import Trust

TIMEOUT = 4.0
"""Seconds for connecting and for each part of the answer."""
MAX_BODY = 300
"""Bytes of an answer that are shown."""


def probe(url: str) -> int:
    """Asks a URL, and says on standard error what is wrong. Returns the exit status: 0 if the answer is 200, else 1."""
    try:
        why = unwell(url)
    except EmbferryError as error:
        why = error.detail
    except (http.client.HTTPException, OSError, ValueError) as error:
        why = f"{url}: {str(error) or type(error).__name__}"
    if why:
        print(f"embferry: {printable(why)}", file=sys.stderr)
    return 1 if why else 0


def unwell(url: str) -> str:
    """Returns what is wrong with the part that answers at a URL; "" if nothing is.

    With TLS files in the environment, it shows the certificate of this part and verifies the other one, but not its
    name at a loopback address: a part that is asked from within its own container has another name outside.

    Args:
        url: With or without a scheme; without one it is https where the environment demands TLS.

    Raises:
        EmbferryError: The environment is wrong.
        HTTPException, OSError: There is no answer.
        ValueError: The URL is malformed.
    """
    trust = Trust.of_environment()
    parts = urlsplit(url if "://" in url else f"{trust.scheme}://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("write it as 127.0.0.1:8000/health")
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context() if trust.tls is None else trust.tls.dialling()
        context.check_hostname = not is_loopback(parts.hostname)
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=TIMEOUT, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)
    try:
        connection.request("GET", parts.path or "/health", headers={"Accept-Encoding": "identity"})
        answer = connection.getresponse()
        body = answer.read(MAX_BODY).decode("utf-8", "replace")
        return "" if answer.status == 200 else f"{url}: {answer.status} {body}"
    finally:
        connection.close()
