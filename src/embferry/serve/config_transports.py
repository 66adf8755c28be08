"""The setting ``transports``: its values and their validation."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

from embferry.transports.registry import TRANSPORTS

AUTO = "auto"
SAME_HOST = ("shm", "tcp")
"""What :data:`AUTO` selects when every peer runs on this host."""


def known_transport(name: str) -> str:
    if name != AUTO and name not in TRANSPORTS:
        names = ", ".join((AUTO, *TRANSPORTS))
        raise PydanticCustomError("transport", "unknown transport; choose from {names}", {"names": names})
    return name


def transports_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("transports", "a transport is listed twice")
    if AUTO in names and len(names) > 1:
        raise PydanticCustomError("transports", "auto must stand alone: it selects all transports and their order")
    return names
