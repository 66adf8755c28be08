"""The Mooncake Transfer Engine called directly: registered memory, one ``transfer_sync_write``, no copy beside its own.

With the option ``tuned`` it has the settings of our own transport (pooled connections, larger slices); otherwise its
defaults, except that it does not log each transfer.
"""

from __future__ import annotations

import os

from embferry.transports.leased.mooncake.engine import DEFAULTS

from ..contract import Bytes, Facts, Job, Link, Sending, TensorReceiving, UnavailableError


class _Engine:
    def __init__(self, job: Job, tensor: Bytes) -> None:
        os.environ.update({"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR"} | (DEFAULTS if "tuned" in job.options else {}))
        try:
            from mooncake.engine import TransferEngine
        except ImportError as error:
            raise UnavailableError(
                f"the engine does not load: {error}; on Debian apt-get install libibverbs1 libnuma1 libcurl4"
            ) from error
        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the Mooncake engine did not start")
        self.session = f"127.0.0.1:{self.engine.get_rpc_port()}"
        self.address = tensor.ctypes.data
        if self.engine.register_memory(self.address, tensor.nbytes):
            raise RuntimeError("the Mooncake engine did not register the tensor")

    def close(self) -> None:
        self.engine.unregister_memory(self.address)


class MooncakeSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)
        self._own = _Engine(job, source)

    def connect(self, other: Facts) -> None:
        self._session, self._target = other["session"], other["target"]

    def send(self) -> None:
        code = self._own.engine.transfer_sync_write(self._session, self._own.address, self._target, self.source.nbytes)
        if code:
            raise RuntimeError(f"the Mooncake engine could not write (its code is {code})")
        self.link.tell()

    def close(self) -> None:
        self._own.close()


class MooncakeReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._own = _Engine(job, self.tensor)

    def address(self) -> Facts:
        return {"session": self._own.session, "target": self._own.address}

    def close(self) -> None:
        self._own.close()
