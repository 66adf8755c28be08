"""NIXL called directly, with UCX: memory registered and agents connected once, then one write a round, then a word.

Straight from tensor to tensor. NIXL's binding is used instead of its Python class, because that one's progress thread
never sleeps; for the same reason the wait for completion naps between two looks. What UCX uses is its own choice."""

from __future__ import annotations

import base64
import time

import numpy as np

from embferry.transports.leased.nixl.agent import binding

from ..contract import Bytes, Facts, Job, Link, Receiving, Sending

PROGRESS_US = 1000
NAP_S = 20e-6


class _Agent:
    def __init__(self, name: str, tensor: Bytes) -> None:
        self.nixl = nixl = binding()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, PROGRESS_US
        config.useListenThread = False
        self.agent = nixl.nixlAgent(name, config)
        self.agent.createBackend("UCX", {})
        self.tensor = tensor
        self.registered = nixl.nixlRegDList(nixl.DRAM_SEG, [(tensor.ctypes.data, tensor.nbytes, 0, "")])
        self.agent.registerMem(self.registered, [])

    def close(self) -> None:
        self.agent.deregisterMem(self.registered, [])
        del self.agent


class NixlSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._link, self._timeout_s = source, link, job.timeout_s
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
        status, deadline = agent.postXferReq(request, b""), time.monotonic() + self._timeout_s
        while status == nixl.NIXL_IN_PROG and time.monotonic() < deadline:
            time.sleep(NAP_S)
            status = agent.getXferStatus(request)
        if status != nixl.NIXL_SUCCESS:
            raise RuntimeError(f"NIXL could not write: {status}")
        self._link.tell()
        agent.releaseXferReq(request)
        self.moved += size

    def close(self) -> None:
        self._own.close()


class NixlReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._tensor, self._link = np.empty(job.size, np.uint8), link
        self._own = _Agent("bench-receiver", self._tensor)

    def address(self) -> Facts:
        metadata = base64.b64encode(bytes(self._own.agent.getLocalMD())).decode()
        return {"metadata": metadata, "target": self._tensor.ctypes.data}

    def receive(self) -> None:
        self._link.wait()

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def close(self) -> None:
        self._own.close()
