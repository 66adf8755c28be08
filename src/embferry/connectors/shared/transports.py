"""The transports that a connector's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from embferry import TRANSPORTS, LocalProtocolError, Transport, Trust


def check_names(names: Sequence[str], setting: str) -> None:
    """Raises LocalProtocolError if one of the names is not a transport's, or there is none."""
    unknown = [name for name in names if name not in TRANSPORTS]
    if unknown or not names:
        raise LocalProtocolError(f"{setting} are some of {', '.join(TRANSPORTS)}, not {unknown}")


def make_transports(names: Sequence[str], host: str, advertise: str | None, trust: Trust) -> list[Transport]:
    """Returns new transports, one for each name, that listen at ``host`` and tell the other side ``advertise``.

    Raises:
        TransportError: The engine of a transport is not installed, or its address is not available.
    """
    address: dict[str, Any] = {"host": host, "advertise": advertise or host, "trust": trust}
    made: list[Transport] = []
    try:
        for spec in (TRANSPORTS[name] for name in names):
            made.append(spec.load()(**(address if spec.listens else {})))
    except BaseException:
        for transport in made:
            transport.close()
        raise
    return made
