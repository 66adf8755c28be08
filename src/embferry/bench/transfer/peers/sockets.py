"""The limit of a network: ``sendall`` and ``recv_into`` over one TCP connection, straight into the tensor."""

from __future__ import annotations

import socket

from ..contract import Facts, Job, Link, Sending, TensorReceiving


class SocketSending(Sending):
    def connect(self, other: Facts) -> None:
        self._connection = socket.create_connection(("127.0.0.1", other["port"]), self.job.timeout_s)
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self) -> None:
        self._connection.sendall(self.source.data)

    def close(self) -> None:
        self._connection.close()


class SocketReceiving(TensorReceiving):
    def __init__(self, job: Job, link: Link) -> None:
        super().__init__(job, link)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(job.timeout_s)
        self._connection: socket.socket | None = None

    def address(self) -> Facts:
        return {"port": self._listener.getsockname()[1]}

    def receive(self) -> None:
        if self._connection is None:
            self._connection, _ = self._listener.accept()
            self._connection.settimeout(self.job.timeout_s)
        self.fill(self._connection.recv_into)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
