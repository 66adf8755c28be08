"""NIXL called directly, over UCX: registered memory, connected agents, one write a round. UCX chooses how.

Uses NIXL's binding instead of its Python class, whose progress thread never sleeps.
"""

from __future__ import annotations

import base64
import time

from embferry.transports.leased.nixl.agent import binding

from ..contract import Bytes, Facts, Job, Link, Sending, TensorReceiving

PROGRESS_US = 1000
NAP_S = 20e-6
"""Between two looks whether a write has completed; without it the wait would fill a core."""


class _Agent:
    def __init__(self, name: str, tensor: Bytes) -> None:
        self.nixl = nixl = binding()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        config.useListenThread = False
        self.agent = nixl.nixlAgent(name, config)
        self.agent.createBackend("UCX", {})
        self._registered = nixl.nixlRegDList(nixl.DRAM_SEG, [(tensor.ctypes.data, tensor.nbytes, 0, "")])
        self.agent.registerMem(self._registered, [])

    def close(self) -> None:
        self.agent.deregisterMem(self._registered, [])
        del self.agent


class NixlSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        super().__init__(job, source, link)
        self._own = _Agent("bench-sender", source)

    def connect(self, other: Facts) -> None:
        peer = self._own.agent.loadRemoteMD(base64.b64decode(other["metadata"]))
        self._peer = peer.decode() if isinstance(peer, bytes) else str(peer)
        self._own.agent.makeConnection(self._peer, [])
        self._target = other["target"]

    def send(self) -> None:
        nixl, agent, size = self._own.nixl, self._own.agent, self.source.nbytes
        here = nixl.nixlXferDList(nixl.DRAM_SEG, [(self.source.ctypes.data, size, 0)])
        there = nixl.nixlXferDList(nixl.DRAM_SEG, [(self._target, size, 0)])
        request = agent.createXferReq(nixl.NIXL_WRITE, here, there, self._peer, b"", [])
        status, deadline = agent.postXferReq(request, b""), time.monotonic() + self.job.timeout_s
        while status == nixl.NIXL_IN_PROG and time.monotonic() < deadline:
            time.sleep(NAP_S)
            status = agent.getXferStatus(request)
        if status != nixl.NIXL_SUCCESS:
            raise RuntimeError(f"NIXL could not write: {status}")
        self.link.tell()
        agent.releaseXferReq(request)

    def close(self) -> None:
        self._own.close()


class NixlReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._own = _Agent("bench-receiver", self.tensor)

    def address(self) -> Facts:
        metadata = base64.b64encode(bytes(self._own.agent.getLocalMD())).decode()
        return {"metadata": metadata, "target": self.tensor.ctypes.data}

    def close(self) -> None:
        self._own.close()
