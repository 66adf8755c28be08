"""The roads embeddings can travel, in the order of preference. A road more is a line more here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NamedTuple

from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from embferry.disaggregation.base.conn_multimodal import Transport

AUTO = "auto"
WITHIN_A_HOST = ("shm", "tcp")
"""What :data:`AUTO` stands for where all peers are on this host."""


class RoadKind(NamedTuple):
    """``folder`` of its transport in ``disaggregation``, ``transport``: its class; ``listens``: takes an address;
    ``engine``: is of use only where something else is installed."""

    folder: str
    transport: str
    listens: bool = True
    engine: bool = False

    def load(self) -> type[Transport]:
        """The class itself: imported when it is wanted, for that may take a while."""
        module = importlib.import_module(f"embferry.disaggregation.{self.folder}.conn_multimodal")
        transport: type[Transport] = getattr(module, self.transport)
        return transport


ROADS = {
    "shm": RoadKind("shm", "ShmTransport", listens=False),
    "nixl": RoadKind("nixl", "NixlTransport", engine=True),
    "mooncake": RoadKind("mooncake", "MooncakeTransport", engine=True),
    "tcp": RoadKind("tcp", "TcpTransport"),
    "http": RoadKind("http", "HttpTransport"),
}
"""NIXL before Mooncake: UCX takes the fastest of what the network has by itself, and each sender needs its token.
Both before TCP, for whoever has installed an engine wants it. HTTP last: it is for where the others cannot get
through."""


def known_road(name: str) -> str:
    if name != AUTO and name not in ROADS:
        names = ", ".join((AUTO, *ROADS))
        raise PydanticCustomError("road", "there is no such road; there are {names}", {"names": names})
    return name


def roads_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("roads", "a road is there twice")
    if AUTO in names and len(names) > 1:
        raise PydanticCustomError("roads", "auto stands alone: it chooses all roads and their order")
    return names
