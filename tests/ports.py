"""Ports for servers that a test starts."""

from __future__ import annotations

from embferry.serve.supervisor.reserved_ports import ReservedPorts

_RESERVED: list[ReservedPorts] = []
"""Held until the process of the tests ends, so that the ports stay free for the servers."""


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port of this address for a server. No other program gets it, even if the server loads for minutes."""
    _RESERVED.append(ReservedPorts(host, 1))
    return _RESERVED[-1].numbers[0]
