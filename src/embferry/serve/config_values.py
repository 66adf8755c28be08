"""The types of settings that are more than a number or a text, and their checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from embferry.transports.registry import TRANSPORTS

MIB = 1 << 20
AUTO = "auto"
"""Value of the setting ``transports``: every transport that works here, in the registry's order."""
SAME_HOST = ("shm", "tcp")
"""The transports that AUTO selects when every peer runs on this host."""


def _split(value: Any) -> Any:
    """Splits ``a,b``, the form of a list on the command line and in the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _without_parameters(value: Any) -> Any:
    """Accepts a list of names in place of a mapping from names to parameters."""
    names = _split(value)
    return {name: {} for name in names} if isinstance(names, list | tuple) else names


def _base_url(text: str) -> str:
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", text):
        raise PydanticCustomError("url", "not a base URL such as http://10.0.0.2:8001")
    return text


def _known_transport(name: str) -> str:
    if name != AUTO and name not in TRANSPORTS:
        names = ", ".join((AUTO, *TRANSPORTS))
        raise PydanticCustomError("transport", "unknown transport; choose from {names}", {"names": names})
    return name


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise PydanticCustomError("transports", "a transport is listed twice")
    if AUTO in names and len(names) > 1:
        raise PydanticCustomError("transports", "auto must stand alone: it selects all transports and their order")
    return names


Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Urls = Annotated[tuple[Annotated[str, AfterValidator(_base_url)], ...], BeforeValidator(_split)]
Folders = Annotated[tuple[Path, ...], BeforeValidator(_split)]
TransportName = Annotated[str, AfterValidator(_known_transport)]
Transports = Annotated[
    tuple[TransportName, ...], BeforeValidator(_split), AfterValidator(_each_once), Field(min_length=1)
]
AnyTransports = Annotated[tuple[TransportName, ...], BeforeValidator(_split), AfterValidator(_each_once)]
Parameter = Annotated[str, Field(coerce_numbers_to_str=True)]
METADATA_SERVER = r"^(P2PHANDSHAKE|(https?|etcd|redis)://\S+)$"
"""The values that Mooncake accepts; with any other its engine ends the process."""
Backends = Annotated[dict[str, dict[str, Parameter]], BeforeValidator(_without_parameters), Field(min_length=1)]
