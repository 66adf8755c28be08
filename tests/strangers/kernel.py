"""The sockets of a process, as the kernel lists them in /proc."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import struct
from dataclasses import dataclass
from pathlib import Path

ESTABLISHED, LISTEN = "01", "0A"


@dataclass(frozen=True)
class Socket:
    """One end of a TCP connection, or a listening socket.

    Attributes:
        host: The own address.
        port: The own port.
        state: In the kernel's numbers.
    """

    host: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    state: str


def sockets_of(pid: int) -> list[Socket]:
    """Returns the TCP sockets of a process, IPv4 and IPv6. One that was not accepted yet belongs to no process."""
    own = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
            if target.startswith("socket:["):
                own.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[9] in own:
                host, _, port = columns[1].partition(":")
                found.append(Socket(_address(host), int(port, 16), columns[3]))
    return found


def listening_of(pid: int) -> list[Socket]:
    return [sock for sock in sockets_of(pid) if sock.state == LISTEN]


def accepted_at(pid: int, port: int) -> list[Socket]:
    """Returns the connections that a process has accepted at a port and has not closed."""
    return [sock for sock in sockets_of(pid) if sock.port == port and sock.state != LISTEN]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Returns an address of /proc/net/tcp: words of four bytes in the machine's order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    return ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
