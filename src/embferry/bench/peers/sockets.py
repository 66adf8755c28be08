"""The limit of a network: ``sendall`` and ``recv_into`` over one TCP connection, straight into the tensor."""

from __future__ import annotations

import socket

import numpy as np

from ..contract import Bytes, Facts, Job, Link, Receiving, Sending


class SocketSending(Sending):
    def __init__(self, job: Job, source: Bytes, link: Link) -> None:
        self.source, self._timeout_s = source, job.timeout_s

    def connect(self, other: Facts) -> None:
        self._connection = socket.create_connection(("127.0.0.1", other["port"]), self._timeout_s)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        self._connection.sendall(self.source.data)

    def close(self) -> None:
        self._connection.close()


class SocketReceiving(Receiving):
    def __init__(self, job: Job, link: Link) -> None:
        self._tensor = np.empty(job.size, np.uint8)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(job.timeout_s)
        self._timeout_s = job.timeout_s
        self._connection: socket.socket | None = None

    def address(self) -> Facts:
        return {"port": self._listener.getsockname()[1]}

    def receive(self) -> None:
        if self._connection is None:
            self._connection, _ = self._listener.accept()
            self._connection.settimeout(self._timeout_s)
        view, got = memoryview(self._tensor.data), 0
        while got < len(view):
            count = self._connection.recv_into(view[got:])
            if not count:
                raise EOFError("the connection ended before the embedding did")
            got += count

    def arrays(self) -> list[Bytes]:
        return [self._tensor]

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
