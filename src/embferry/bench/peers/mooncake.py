"""The Mooncake Transfer Engine called directly: memory registered once, then ``transfer_sync_write``, then a word.

Straight from tensor to tensor, no copy beside the engine's own. ``tuned`` sets for it what our own transport sets
(pooled connections, larger slices); without, the engine's defaults, except that it does not log each transfer."""

from __future__ import annotations

import os

import numpy as np

from embferry.transports.leased.mooncake.engine import DEFAULTS

from ..contract import Bytes, Facts, Job, Link, Receiving, Sending, UnavailableError

PEER_TO_PEER = "P2PHANDSHAKE"


class _Engine:
    def __init__(self, job: Job, tensor: Bytes) -> None:
        os.environ["MC_FORCE_TCP"] = "1"
        os.environ["MC_LOG_LEVEL"] = "ERROR"
        if job.options.get("tuned"):
            os.environ.update(DEFAULTS)
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise UnavailableError(
                f"the engine does not load: {error}; on Debian apt-get install libibverbs1"
            ) from error
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", PEER_TO_PEER, "tcp", ""):
            raise RuntimeError("the Mooncake engine did not start")
        self.session = f"127.0.0.1:{self.engine.get_rpc_port()}"
        self.address = tensor.ctypes.data
        if self.engine.register_memory(self.address, tensor.nbytes):
            raise RuntimeError("the Mooncake engine did not register the tensor")

    def close(self) -> None:
        self.engine.unregister_memory(self.address)


class MooncakeSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._link = source, link
        self._own = _Engine(job, source)

    def connect(self, other: Facts) -> None:
        self._session, self._target = other["session"], other["target"]

    def send(self) -> None:
        code = self._own.engine.transfer_sync_write(self._session, self._own.address, self._target, self.source.nbytes)
        if code:
            raise RuntimeError(f"the Mooncake engine could not write (its code {code})")
        self._link.tell()

    def close(self) -> None:
        self._own.close()


class MooncakeReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._tensor, self._link = np.empty(job.size, np.uint8), link
        self._own = _Engine(job, self._tensor)

    def address(self) -> Facts:
        return {"session": self._own.session, "target": self._own.address}

    def receive(self) -> None:
        self._link.wait()

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def close(self) -> None:
        self._own.close()
