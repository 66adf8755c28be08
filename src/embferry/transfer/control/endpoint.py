"""Endpoints of the control plane: ``tcp://host:port``, or ``tls://host:port`` if the peer demands TLS."""

from __future__ import annotations

import ipaddress
import re
from functools import lru_cache

from embferry.protocol.errors import LocalProtocolError

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")  # RFC 1123, and the underscores of container networks
_PORT = re.compile(r"[0-9]{1,5}")
MAX_NAME = 253


def tcp_endpoint(host: str, port: int, scheme: str = "tcp") -> str:
    """Returns the endpoint of a TCP address. An IPv6 address gets brackets."""
    return f"{scheme}://[{host.strip('[]')}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_endpoint(endpoint: str) -> str:
    """Returns ``endpoint`` if a peer can be behind it.

    Raises:
        LocalProtocolError: It is not ``tcp://host:port`` or ``tls://host:port`` with an IPv4 address, an IPv6 address
            in brackets or a name.
    """
    host_and_port(endpoint)
    return endpoint


def host_and_port(endpoint: str) -> tuple[str, int]:
    """Splits an endpoint into a host, without brackets, and a port.

    Raises:
        LocalProtocolError: As :func:`check_endpoint`.
    """
    if isinstance(endpoint, str) and (found := _split(endpoint)) is not None:
        return found
    text = ascii(endpoint)[:100]
    raise LocalProtocolError(f"{text} is not a control endpoint; it looks like tcp://10.0.0.7:5555")


@lru_cache(maxsize=256)
def _split(endpoint: str) -> tuple[str, int] | None:
    """Returns host and port. Transfers come from few endpoints, each again and again."""
    scheme, _, rest = endpoint.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme in ("tcp", "tls") and _PORT.fullmatch(port) and 0 < int(port) < 65536 and _is_host(host):
        return host.strip("[]"), int(port)
    return None


def demands_tls(endpoint: str) -> bool:
    """Returns whether the peer behind a checked endpoint accepts no connection without TLS."""
    return endpoint.startswith("tls:")


def is_address(host: str) -> bool:
    """Returns whether ``host`` is an IP address, which needs no name server."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    if host.startswith("[") and host.endswith("]"):
        return ":" in host and host.isascii() and host.isprintable() and is_address(host[1:-1])
    return len(host) <= MAX_NAME and _NAME.fullmatch(host) is not None
