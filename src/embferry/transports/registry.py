"""The registry of transports, in order of preference. Adding a transport takes a folder and one line here."""

from __future__ import annotations

import importlib
from typing import NamedTuple

from .contract import Transport


class TransportSpec(NamedTuple):
    """Where a transport is implemented, and what it needs.

    Attributes:
        folder: The package below ``embferry.transports`` whose module ``transport`` holds the class.
        class_name: The class in that module.
        listens: Whether the constructor takes ``host`` and ``advertise``.
        needs_engine: Whether the transport needs a transfer engine that is installed separately.
    """

    folder: str
    class_name: str
    listens: bool = True
    needs_engine: bool = False

    def load(self) -> type[Transport]:
        """Returns the class. Imports it on first use, because an engine takes a while to import."""
        module = importlib.import_module(f"{__package__}.{self.folder}.transport")
        found: type[Transport] = getattr(module, self.class_name)
        return found


TRANSPORTS = {
    "shm": TransportSpec("shm", "ShmTransport", listens=False),
    "nixl": TransportSpec("leased.nixl", "NixlTransport", needs_engine=True),
    "mooncake": TransportSpec("leased.mooncake", "MooncakeTransport", needs_engine=True),
    "tcp": TransportSpec("tcp", "TcpTransport"),
    "http": TransportSpec("http", "HttpTransport"),
}
"""NIXL stands before Mooncake because UCX picks the fastest network path by itself and because every NIXL sender needs
a token. Both stand before TCP: an installed engine is meant to be used. HTTP stands last: it is for networks that let
nothing else through."""
