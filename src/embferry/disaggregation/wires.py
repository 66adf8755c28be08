"""Which wire a worker speaks: ours, or the origin's.

``wire="embferry"``, the default, is our protocol over the transports given; ``wire="origin"`` is SGLang's control plane over
the Mooncake Transfer Engine, for deployments whose other side is SGLang's. The managers differ in what they are given
and in how a room is opened (``docs/origin-wire.md``); the ends they open have the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport

from .mooncake.conn_multimodal import EncodeManager, LanguageManager, OriginSettings

__all__ = ["Wire", "receive_manager", "send_manager"]

Wire = Literal["embferry", "origin"]


@overload
def send_manager(
    geometry: Geometry,
    transports: Sequence[Transport],
    *,
    wire: Literal["embferry"] = "embferry",
    host: str = "127.0.0.1",
    port: int = 0,
    transfer: TransferSettings | None = None,
) -> SendManager: ...
@overload
def send_manager(
    geometry: Geometry,
    *,
    wire: Literal["origin"],
    bootstrap_url: str | None = None,
    settings: OriginSettings | None = None,
    transfer: TransferSettings | None = None,
) -> EncodeManager: ...
def send_manager(
    geometry: Geometry,
    transports: Sequence[Transport] = (),
    *,
    wire: Wire = "embferry",
    host: str = "127.0.0.1",
    port: int = 0,
    bootstrap_url: str | None = None,
    settings: OriginSettings | None = None,
    transfer: TransferSettings | None = None,
) -> SendManager | EncodeManager:
    """The encode side's manager.

    :param geometry: of the language side's pool. Our wire needs its layout only; the rest is in the peer's messages.
    :param transports: transports, for our wire.
    :param bootstrap_url: where to register this rank, on the origin's.
    :param settings: of the origin's wire.
    :raises LocalProtocolError: an argument belongs to the other wire.
    """
    if wire == "origin":
        _none_of(wire, transports=transports)
        return EncodeManager(geometry, bootstrap_url=bootstrap_url, settings=settings, transfer=transfer)
    _none_of(wire, bootstrap_url=bootstrap_url, settings=settings)
    return SendManager(geometry.layout, transports, host=host, port=port, settings=transfer)


@overload
def receive_manager(
    geometry: Geometry,
    transports: Sequence[Transport],
    *,
    wire: Literal["embferry"] = "embferry",
    transfer: TransferSettings | None = None,
) -> ReceiveManager: ...
@overload
def receive_manager(
    geometry: Geometry,
    *,
    wire: Literal["origin"],
    settings: OriginSettings | None = None,
    transfer: TransferSettings | None = None,
) -> LanguageManager: ...
def receive_manager(
    geometry: Geometry,
    transports: Sequence[Transport] = (),
    *,
    wire: Wire = "embferry",
    settings: OriginSettings | None = None,
    transfer: TransferSettings | None = None,
) -> ReceiveManager | LanguageManager:
    """The language side's manager, with its pool.

    :param transports: transports, for our wire.
    :param settings: of the origin's wire.
    :raises LocalProtocolError: an argument belongs to the other wire.
    """
    if wire == "origin":
        _none_of(wire, transports=transports)
        return LanguageManager(geometry, settings=settings, transfer=transfer)
    _none_of(wire, settings=settings)
    return ReceiveManager(geometry, transports, settings=transfer)


def _none_of(wire: Wire, **arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise LocalProtocolError(f"{name} does not go with wire={wire!r}")
