"""A server of the tests with plain sockets, and a thread for each connection."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

SECONDS = 60.0
"""Longest wait for an event. Far longer than any takes, so that a busy machine does not fail a test."""


class PlainServer(ABC):
    """Accepts connections on the loopback interface. A context manager, which leaves no thread.

    Attributes:
        port: Where clients connect.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._run, name=type(self).__name__)

    @abstractmethod
    def serve(self, client: socket.socket) -> None:
        """Serves one connection, which is closed afterwards."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        self._listener.close()

    def _run(self) -> None:
        threads = []
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                break
            threads.append(threading.Thread(target=self._serve, args=(client,), name=type(self).__name__))
            threads[-1].start()
        for thread in threads:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(SECONDS)
            self.serve(client)
