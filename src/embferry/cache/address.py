"""The URL of a store: ``file:///path`` or ``mooncake://host:port``."""

from __future__ import annotations

from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

from embferry.protocol.errors import LocalProtocolError

from .contract import Store

MOONCAKE_OPTIONS = {
    "protocol": str,
    "device": str,
    "metadata_server": str,
    "segment_bytes": int,
    "buffer_bytes": int,
}
"""Options in the query of a Mooncake store's URL, and their types."""


class FolderAddress(NamedTuple):
    """The path of a folder."""

    path: str


class MooncakeAddress(NamedTuple):
    """Where the master of a Mooncake store is, ``host:port``, and the options of :class:`MooncakeSettings`."""

    master: str
    options: dict[str, Any]


def parse(url: str) -> FolderAddress | MooncakeAddress:
    """Returns what a URL names. Raises LocalProtocolError if it names no store."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise LocalProtocolError(f"the URL of the cache cannot be read: {error}") from None
    path = unquote(parts.path)
    if parts.scheme == "file":
        if host not in (None, "localhost") or parts.query or parts.fragment or not path.startswith("/") or "\0" in path:
            raise LocalProtocolError(f"the URL of a folder is like file:///var/cache/embferry, not {url!r}")
        return FolderAddress(path)
    if parts.scheme != "mooncake":
        raise LocalProtocolError(f"the URL of the cache begins with file:// or mooncake://, not {url!r}")
    if not host or port is None or path not in ("", "/") or parts.username or parts.fragment:
        raise LocalProtocolError(f"the URL of a Mooncake store is like mooncake://10.0.0.1:50051, not {url!r}")
    return MooncakeAddress(f"{host}:{port}", _options(parts.query))


def open_store(address: FolderAddress | MooncakeAddress, max_bytes: int, host: str) -> Store:
    """Opens a store.

    Args:
        address: Which.
        max_bytes: Bound on the bytes of a folder.
        host: The address of this host that other members of a Mooncake store reach it at.

    Raises:
        LocalProtocolError: It cannot be used.
    """
    try:
        if isinstance(address, FolderAddress):
            from .folder import FolderStore

            return FolderStore(address.path, max_bytes)
        from .mooncake import MooncakeSettings, MooncakeStore

        return MooncakeStore(MooncakeSettings(address.master, host, **address.options))
    except (OSError, ImportError) as error:
        raise LocalProtocolError(f"the cache cannot be used: {error}") from error


def _options(query: str) -> dict[str, Any]:
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        options = {name: MOONCAKE_OPTIONS[name](text) for name, text in given.items()}
    except KeyError as error:
        names = ", ".join(MOONCAKE_OPTIONS)
        raise LocalProtocolError(f"the options of a Mooncake store are {names}, not {error.args[0]!r}") from None
    except ValueError as error:
        raise LocalProtocolError(f"the options of a Mooncake store cannot be read: {error}") from None
    if options.get("segment_bytes", 0) < 0 or options.get("buffer_bytes", 1) < 1:
        raise LocalProtocolError("the sizes of a Mooncake store are not negative, and buffer_bytes is positive")
    return options
