"""Managers by the name of their wire: our own protocol, or the origin's.

``wire="embferry"``, the default, is our own protocol over the given transports. ``wire="origin"`` is SGLang's control
plane over the Mooncake Transfer Engine, for deployments with SGLang on the other side. The managers differ in their
arguments and in how a room is opened (``docs/origin-wire.md``); the handles that they open have the same methods.
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
    """Makes the encode side's manager.

    Args:
        geometry: The language side's pool. Our own protocol needs its layout only; peers send the rest.
        transports: Transports (our own protocol only).
        wire: Name of the wire.
        host: Address to listen on (our own protocol only; the origin's has it in ``settings``).
        port: Port to listen on, 0 for a free one (our own protocol only).
        bootstrap_url: Bootstrap server that this rank registers at (the origin's wire only).
        settings: Settings of this rank (the origin's wire only).
        transfer: Time-outs and sizes of the transfers.

    Raises:
        LocalProtocolError: An argument belongs to the other wire.
    """
    if wire == "origin":
        _refuse(wire, transports=transports)
        return EncodeManager(geometry, bootstrap_url=bootstrap_url, settings=settings, transfer=transfer)
    _refuse(wire, bootstrap_url=bootstrap_url, settings=settings)
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
    """Makes the language side's manager, which owns the pool.

    Args:
        geometry: The pool.
        transports: Transports (our own protocol only).
        wire: Name of the wire.
        settings: Settings of this rank (the origin's wire only).
        transfer: Time-outs and sizes of the transfers.

    Raises:
        LocalProtocolError: An argument belongs to the other wire.
    """
    if wire == "origin":
        _refuse(wire, transports=transports)
        return LanguageManager(geometry, settings=settings, transfer=transfer)
    _refuse(wire, settings=settings)
    return ReceiveManager(geometry, transports, settings=transfer)


def _refuse(wire: Wire, **arguments: object) -> None:
    for name, value in arguments.items():
        if value:
            raise LocalProtocolError(f"{name} does not go with wire={wire!r}")
