"""Managers by the name of their wire: our own protocol, or the origin's.

``wire="embferry"``, the default, is our own protocol over the given transports. ``wire="origin"`` is SGLang's control
plane over the Mooncake Transfer Engine, for deployments with SGLang on the other side. The managers differ in their
arguments and in how a room is opened (``docs/origin-wire.md``); the handles that they open have the same methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Geometry
from embferry.protocol.settings import TransferSettings
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.send_manager import SendManager
from embferry.transports.contract import Transport

if TYPE_CHECKING:  # the origin's wire needs pyzmq, our own does not
    from .mooncake.conn_multimodal import EncodeManager, LanguageManager, OriginSettings

__all__ = ["ReceivingManager", "SendingManager", "Wire", "receive_manager", "send_manager"]

Wire = Literal["embferry", "origin"]
SendingManager: TypeAlias = "SendManager | EncodeManager"
ReceivingManager: TypeAlias = "ReceiveManager | LanguageManager"


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
    geometry: Geometry, transports: Sequence[Transport] = (), *, wire: Wire = "embferry", **options: Any
) -> SendManager | EncodeManager:
    """Makes the encode side's manager.

    Args:
        geometry: The language side's pool. Our own protocol needs its layout only; peers send the rest.
        transports: Transports (our own protocol only).
        wire: Name of the wire.
        options: For our own protocol ``host`` and ``port`` to listen on. For the origin's wire ``settings`` of this
            rank and ``bootstrap_url``, the server that it registers at. For both ``transfer``: time-outs and sizes.

    Raises:
        LocalProtocolError: An argument belongs to the other wire.
        ImportError: The origin's wire needs a package that is not installed; the message says which.
    """
    options = _own(wire, transports, options)
    if wire == "origin":
        from .mooncake.encode_manager import EncodeManager

        return EncodeManager(geometry, **options)
    return SendManager(geometry.layout, transports, settings=options.pop("transfer", None), **options)


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
    geometry: Geometry, transports: Sequence[Transport] = (), *, wire: Wire = "embferry", **options: Any
) -> ReceiveManager | LanguageManager:
    """Makes the language side's manager, which owns the pool ``geometry``. The arguments are as above."""
    options = _own(wire, transports, options)
    if wire == "origin":
        from .mooncake.language_manager import LanguageManager

        return LanguageManager(geometry, **options)
    return ReceiveManager(geometry, transports, settings=options.pop("transfer", None), **options)


def _own(wire: Wire, transports: Sequence[Transport], options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of the wire; raises LocalProtocolError if one of the other wire is given."""
    others = ("transports", "host", "port") if wire == "origin" else ("settings", "bootstrap_url")
    for name in others:
        if transports if name == "transports" else options.pop(name, None):
            raise LocalProtocolError(f"{name} does not go with wire={wire!r}")
    return options
