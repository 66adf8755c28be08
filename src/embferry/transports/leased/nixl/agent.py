"""The NIXL binding, as much of it as this transport needs. Here and nowhere else foreign errors become ours."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError, TransportError

PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
"""``nixl`` chooses between the other two by the CUDA in use; each of those works alone, also without a GPU."""

PROGRESS_US = 5000
"""How often, at least, the engine's progress thread looks for arrivals; the network wakes it before. NIXL's own Python
class leaves no choice but 0, with which the thread of an idle agent keeps a core busy: hence the binding beneath it."""

Backends = Mapping[str, Mapping[str, str]]
Descriptors = npt.NDArray[np.uint64]
"""``[n, 3]``: address, length in bytes, device (0: host memory)."""


def installed() -> bool:
    """Whether the NIXL binding can be found. Imports nothing."""
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


@cache
def binding() -> Any:
    """NIXL's binding module.

    :raises TransportError: it is not installed, or does not load.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            continue
        try:
            return importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            raise TransportError(f"NIXL is installed but does not load: {error}", retryable=False) from error
    raise TransportError("NIXL is not installed; pip install 'embferry[nixl]'", retryable=False)


@cache
def engine_errors() -> tuple[type[Exception], ...]:
    """What the binding raises. Its own errors have no class in common."""
    own = (e for e in vars(binding()).values() if isinstance(e, type) and issubclass(e, Exception))
    return (*own, RuntimeError, ValueError)


@contextmanager
def foreign(doing: str, *, retryable: bool = True) -> Iterator[None]:
    """Errors of the engine become ``TransportError``. Details are in NIXL's own log, on standard error."""
    try:
        yield
    except engine_errors() as error:
        raise TransportError(f"NIXL could not {doing}: {error}", retryable=retryable) from error


class Transfer:
    """A write that was prepared, and perhaps posted."""

    def __init__(self, agent: Any, request: int) -> None:
        self._agent, self._request = agent, request
        self._over = False

    def post(self) -> None:
        """Begins it. On some transports (shared memory) the engine copies everything inside this call.

        :raises TransportError: the engine failed. Bytes may be on their way.
        """
        with foreign("write to the receiver"):
            self._see(self._agent.postXferReq(self._request, b""))

    def is_over(self) -> bool:
        """Whether every byte is in the peer's memory.

        :raises TransportError: the engine failed. Bytes may still be on their way.
        """
        if not self._over:
            with foreign("write to the receiver"):
                self._see(self._agent.getXferStatus(self._request))
        return self._over

    def release(self) -> None:
        with foreign("release a transfer"):
            self._agent.releaseXferReq(self._request)

    def _see(self, status: Any) -> None:
        self._over = status == binding().NIXL_SUCCESS
        if not self._over and status != binding().NIXL_IN_PROG:
            raise TransportError(f"NIXL could not write to the receiver: {status}")


class Agent:
    """A NIXL agent with its backends. For one thread at a time; it has a progress thread of its own inside the engine.

    :raises TransportError: a backend is missing or refuses its parameters; not worth a retry.
    """

    def __init__(self, backends: Backends) -> None:
        self._nixl = nixl = binding()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        with foreign("make an agent", retryable=False):
            self._agent = nixl.nixlAgent(f"embferry-{secrets.token_hex(8)}", config)
            available = self._agent.getAvailPlugins()
        for name, parameters in backends.items():
            if name not in available:
                raise TransportError(
                    f"NIXL has no backend {name}; it has {', '.join(sorted(available))}", retryable=False
                )
            with foreign(f"set up its backend {name} with {dict(parameters)}", retryable=False):
                self._agent.createBackend(name, dict(parameters))

    def register(self, ranges: Sequence[tuple[int, int]]) -> Any:
        """Registers host memory, ``(address, length)`` each. Ranges must not overlap: NIXL would lose track of them."""
        described = [(address, length, 0, "") for address, length in ranges]
        with foreign("register memory", retryable=False):
            registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, described)
            self._agent.registerMem(registered, [])
        return registered

    def deregister(self, registered: Any) -> None:
        with foreign("deregister memory"):
            self._agent.deregisterMem(registered, [])

    def metadata(self) -> bytes:
        with foreign("describe its agent"):
            return bytes(self._agent.getLocalMD())

    def join(self, metadata: bytes) -> str:
        """Makes the peer with this metadata known and returns its name."""
        with foreign("use the receiver's metadata; do both ends have the same version of NIXL?", retryable=False):
            peer = self._agent.loadRemoteMD(metadata)
        peer = peer.decode() if isinstance(peer, bytes) else str(peer)
        with foreign("connect to the receiver; have both ends a network in common?"):
            self._agent.makeConnection(peer, [])
        return peer

    def prepare(self, peer: str, local: Descriptors, remote: Descriptors) -> Transfer:
        """A write from ``local`` to ``remote``, nothing sent yet."""
        nixl = self._nixl
        with foreign("prepare a write"):
            source, destination = nixl.nixlXferDList(nixl.DRAM_SEG, local), nixl.nixlXferDList(nixl.DRAM_SEG, remote)
            request = self._agent.createXferReq(nixl.NIXL_WRITE, source, destination, peer, b"", [])
        return Transfer(self._agent, request)

    def close(self) -> None:
        """Destroys the agent: its threads end, its sockets close, and nothing that arrives later is stored.

        :raises LocalProtocolError: something still refers to it, so all of that is not true."""
        alive = weakref.ref(self._agent)
        self._agent = None
        if alive() is not None:
            gc.collect()
        if alive() is not None:
            raise LocalProtocolError("a NIXL agent is still in use and could not be destroyed; report this as a bug")


def fresh(error: TransportError) -> TransportError:
    """The same without its traceback, whose frames would keep an agent alive."""
    return TransportError(error.detail, retryable=error.retryable)
