"""What a process uses: CPU time, memory, bytes handed to the network."""

from __future__ import annotations

import os
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

TCP_INFO_BYTES_SENT = 200
"""Offset of ``tcpi_bytes_sent`` in ``struct tcp_info`` (linux/tcp.h, since Linux 4.19): payload, retransmissions
included, headers of TCP and IP not."""
SO_COOKIE = 57
_PROC = Path("/proc/self")


def cpu_seconds() -> float:
    """User and system time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak() -> str:
    """Forgets this process's peak of resident memory. Answers how the peak is measured from now on."""
    try:
        (_PROC / "clear_refs").write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return "VmHWM since the process began: this system does not let it be reset"
    return "VmHWM, reset before the end was made"


def memory(name: str) -> int:
    """A line of ``/proc/self/status`` such as ``VmHWM`` or ``VmRSS``, bytes. Both count mapped shared memory."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"the kernel does not report {name}")


class SentBytes:
    """Bytes that the TCP sockets of this process have sent, whichever library opened them.

    Asks the kernel about each open socket, so a socket that was opened and closed between two calls is not seen."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self.delta()

    def delta(self) -> int:
        """Bytes sent since the last call."""
        now = dict(_tcp_sockets())
        sent = sum(count - self._seen.get(cookie, 0) for cookie, count in now.items())
        self._seen = now
        return sent


def _tcp_sockets() -> Iterator[tuple[bytes, int]]:
    """(identity, bytes sent) of each."""
    for name in os.listdir(_PROC / "fd"):
        with suppress(OSError):  # closed meanwhile, or no socket of the kind
            if not os.readlink(_PROC / "fd" / name).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                about = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                if len(about) >= TCP_INFO_BYTES_SENT + 8:
                    cookie = connection.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8)
                    yield cookie, struct.unpack_from("Q", about, TCP_INFO_BYTES_SENT)[0]
