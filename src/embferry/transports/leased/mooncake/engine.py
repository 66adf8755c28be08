"""The binding of the Mooncake Transfer Engine: configured before its first use, and closed without a long wait.

Facts about the engine (0.3.13) that shape this file:

- Its settings are environment variables, read when it is imported or when the first engine is made. Ours are
  :data:`DEFAULTS`; what the user has set is left alone.
- The protocol given to ``initialize`` chooses its memory allocator only. How bytes travel depends on the host: by RDMA
  where there is an RDMA device, by TCP where there is none or ``MC_FORCE_TCP`` is set. This file makes sure of either.
- Its synchronous calls spin, and return at a time limit while the transfer goes on. So does the call for the status of
  batches. ``transfer_submit_write`` and ``transfer_check_status``, for batches of one, do neither.
- Its destructor waits up to a second for a thread in ``accept``, and holds the interpreter's lock meanwhile.
  :meth:`Engine.close` shortens that wait to some milliseconds.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

from embferry.protocol.errors import TransportError

P2P = "P2PHANDSHAKE"
"""Stands in place of a metadata server: the engines ask each other."""

DEFAULTS = {
    "MC_LOG_LEVEL": "ERROR",  # without it every transfer is logged; errors are
    "MC_TCP_ENABLE_CONNECTION_POOL": "1",  # else one connection a slice
    "MC_TCP_SLICE_SIZE": str(256 << 10),  # bytes read or written at a time; the engine's own is 64 KiB
}
ACCEPT_US = 5000
RDMA_DEVICES = "/sys/class/infiniband"

_first = threading.Lock()


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Parameters of an engine.

    Attributes:
        host: The address of this host that peers reach it at.
        protocol: ``tcp`` or ``rdma``, or what another build of the engine has.
        device: Names of RDMA devices to use, comma separated; empty: all.
        metadata_server: :data:`P2P`, or a server the engine knows, such as ``http://10.0.0.1:8080/metadata``.
    """

    host: str
    protocol: str
    device: str
    metadata_server: str


class Engine:
    """One engine: its threads, its ports, its registered memory. :meth:`close` ends them all.

    Raises:
        TransportError: It is not installed, or cannot start as asked; not retryable.
    """

    def __init__(self, settings: EngineSettings) -> None:
        module = _load(settings.protocol)
        # In a metadata server a name stands for one engine; peer to peer the engine appends its port.
        name = settings.host if settings.metadata_server == P2P else f"{settings.host}-{secrets.token_hex(8)}"
        self._engine: Any = module.TransferEngine()
        if self._engine.initialize(name, settings.metadata_server, settings.protocol, settings.device):
            self._engine = None
            raise TransportError(
                f"the Mooncake engine cannot start with {settings}; its own log on standard error says why",
                retryable=False,
            )
        self.port: int = self._engine.get_rpc_port()
        self.segment = f"{settings.host}:{self.port}" if settings.metadata_server == P2P else name

    def register(self, address: int, length: int) -> None:
        """Lets peers write there, and this engine read from there.

        Raises:
            TransportError: Refused, for example because a part of it is registered already.
        """
        if code := self._engine.register_memory(address, length):
            raise TransportError(f"the Mooncake engine cannot register {length} bytes of memory (its code {code})")

    def unregister(self, address: int) -> None:
        """Ends what :meth:`register` allowed, for writes that begin later.

        Raises:
            TransportError: The engine refuses.
        """
        if code := self._engine.unregister_memory(address):
            raise TransportError(f"the Mooncake engine cannot unregister memory (its code {code})", retryable=False)

    def submit(self, segment: str, source: int, target: int, length: int) -> int:
        """Starts a write. Returns the ticket for :meth:`outcome`, or 0 if it could not be started."""
        return int(self._engine.transfer_submit_write(segment, source, target, length))

    def outcome(self, ticket: int) -> int:
        """Returns what has become of a write: 1 applied, 0 under way, -1 failed, -2 overdue and still under way.

        The ticket is used up with 1 and -1.
        """
        return int(self._engine.transfer_check_status(ticket))

    def close(self) -> None:
        """Ends transfers under way; afterwards this engine neither reads nor writes a byte. Idempotent."""
        if self._engine is not None:
            _hasten_accept(self.port)
            self._engine = None  # the last reference: its destructor joins its threads


def _load(protocol: str) -> Any:
    with _first:
        problem = ""
        if os.environ.get("MC_TCP_PROTO") == "1":
            problem = "MC_TCP_PROTO=1 makes the Mooncake engine report writes before they are made; unset it"
        elif protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        elif "MC_FORCE_TCP" in os.environ:
            problem = (
                f"MC_FORCE_TCP is set, by you or by an earlier transport of this process with protocol 'tcp'; "
                f"the Mooncake engine would use TCP instead of {protocol!r}"
            )
        elif protocol == "rdma" and not (os.path.isdir(RDMA_DEVICES) and os.listdir(RDMA_DEVICES)):
            problem = (
                "this host has no RDMA device: the Mooncake engine would use TCP; if that is meant, say protocol='tcp'"
            )
        if problem:
            raise TransportError(problem, retryable=False)
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            return importlib.import_module("mooncake.engine")
        except ImportError as error:
            raise TransportError(
                f"the Mooncake Transfer Engine cannot be loaded ({error}); pip install 'embferry[mooncake]', "
                "and on Debian apt-get install libibverbs1 libnuma1 libcurl4",
                retryable=False,
            ) from error


def _hasten_accept(port: int) -> None:
    """Makes the engine's thread that accepts handshakes wake up every :data:`ACCEPT_US` from now on.

    Without this the destructor works too, but takes up to a second.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            own = os.dup(int(name))
        except OSError:  # closed meanwhile, like the descriptor that listed the directory
            continue
        with socket.socket(fileno=own) as listener:
            if listener.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or listener.getsockname()[1] != port:
                continue
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, ACCEPT_US))
            host = "::1" if listener.family == socket.AF_INET6 else "127.0.0.1"
            with contextlib.suppress(OSError):
                socket.create_connection((host, port), timeout=1.0).close()  # ends the wait that has begun
            return
