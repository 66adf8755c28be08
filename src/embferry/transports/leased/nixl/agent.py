"""The NIXL binding, as much of it as this transport needs. Only here do errors of NIXL become ours."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import secrets
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from embferry.protocol.errors import LocalProtocolError, TransportError

from ..engine_thread import WriteEngine, WriteFailedError
from ..jobs import Run

PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
"""``nixl`` chooses between the other two by the CUDA in use; each of those works alone, also without a GPU."""

PROGRESS_US = 5000
"""How often, at least, the engine's progress thread looks for arrivals; the network wakes it before. NIXL's own Python
class leaves no choice but 0, with which the thread of an idle agent keeps a core busy: hence the binding beneath it."""

Backends = Mapping[str, Mapping[str, str]]


def installed() -> bool:
    """Returns whether the NIXL binding can be found. Imports nothing."""
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


@cache
def binding() -> Any:
    """Returns NIXL's binding module.

    Raises:
        TransportError: It is not installed, or does not load.
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
    """Returns the classes of what the binding raises. Its own errors have no class in common."""
    own = (e for e in vars(binding()).values() if isinstance(e, type) and issubclass(e, Exception))
    return (*own, RuntimeError, ValueError)


@contextmanager
def engine_call(
    doing: str, *, retryable: bool = True, error_class: type[TransportError] = TransportError
) -> Iterator[None]:
    """Turns errors of the engine into ``error_class``. Details are in NIXL's own log, on standard error."""
    try:
        yield
    except engine_errors() as error:
        raise error_class(f"NIXL could not {doing}: {error}", retryable=retryable) from error


class Agent:
    """A NIXL agent with its backends. For one thread at a time; it has a progress thread of its own in the engine."""

    def __init__(self, backends: Backends) -> None:
        self._nixl = nixl = binding()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        with engine_call("make an agent", retryable=False):
            self._agent = nixl.nixlAgent(f"embferry-{secrets.token_hex(8)}", config)
            available = self._agent.getAvailPlugins()
        for name, parameters in backends.items():
            if name not in available:
                raise TransportError(
                    f"NIXL has no backend {name}; it has {', '.join(sorted(available))}", retryable=False
                )
            with engine_call(f"set up its backend {name} with {dict(parameters)}", retryable=False):
                self._agent.createBackend(name, dict(parameters))

    def register(self, address: int, length: int) -> Any:
        """Registers host memory. Ranges must not overlap: NIXL would lose track of them."""
        with engine_call("register memory", retryable=False):
            registered = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(address, length, 0, "")])
            self._agent.registerMem(registered, [])
        return registered

    def deregister(self, registered: Any) -> None:
        with engine_call("deregister memory"):
            self._agent.deregisterMem(registered, [])

    def metadata(self) -> bytes:
        with engine_call("describe its agent"):
            return bytes(self._agent.getLocalMD())

    def close(self) -> None:
        """Destroys the agent: its threads end, its sockets close, and nothing that arrives later is stored.

        Raises:
            LocalProtocolError: Something still refers to it, so all of that is not true.
        """
        alive = weakref.ref(self._agent)
        self._agent = None
        if alive() is not None:
            gc.collect()
        if alive() is not None:
            raise LocalProtocolError("a NIXL agent is still in use and could not be destroyed; report this as a bug")


class WritingAgent(Agent, WriteEngine):
    """The agent of a link, which writes to one peer."""

    max_runs = 4096  # bounds the memory and the time that a request takes to prepare
    max_requests = 4  # the next is on its way while the last is being acknowledged

    def __init__(self, backends: Backends, slice_bytes: int, drain_timeout_s: float) -> None:
        super().__init__(backends)
        self.slice_bytes, self.drain_timeout_s = slice_bytes, drain_timeout_s
        self._peer = ""

    def meet(self, metadata: bytes) -> None:
        with engine_call("use the receiver's metadata; do both ends have the same version of NIXL?", retryable=False):
            peer = self._agent.loadRemoteMD(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else str(peer)
        with engine_call("connect to the receiver; have both ends a network in common?"):
            self._agent.makeConnection(self._peer, [])

    def prepare(self, part: list[Run]) -> int:
        """Returns the number of a new request."""
        nixl = self._nixl
        table = np.array(part, np.uint64)
        local, remote = np.zeros_like(table), np.zeros_like(table)  # address, length, device (0: host memory)
        local[:, 0], remote[:, 0] = table[:, 0], table[:, 1]
        local[:, 1] = remote[:, 1] = table[:, 2]
        with engine_call("prepare a write", error_class=WriteFailedError):
            source, destination = nixl.nixlXferDList(nixl.DRAM_SEG, local), nixl.nixlXferDList(nixl.DRAM_SEG, remote)
            request: int = self._agent.createXferReq(nixl.NIXL_WRITE, source, destination, self._peer, b"", [])
        return request

    def start(self, request: int) -> int:
        """Starts a request. Where it uses shared memory, the engine copies everything inside this call."""
        try:
            self._completed(self._agent.postXferReq, request, b"")
        except TransportError:
            with contextlib.suppress(TransportError):
                self.release(request)
            raise
        return request

    def is_over(self, request: int) -> bool:
        return self._completed(self._agent.getXferStatus, request)

    def release(self, request: int) -> None:
        with engine_call("release a transfer"):
            self._agent.releaseXferReq(request)

    def _completed(self, call: Callable[..., Any], *arguments: object) -> bool:
        with engine_call("write to the receiver"):
            status = call(*arguments)
        if status not in (self._nixl.NIXL_SUCCESS, self._nixl.NIXL_IN_PROG):
            raise TransportError(f"NIXL could not write to the receiver: {status}")
        return bool(status == self._nixl.NIXL_SUCCESS)
