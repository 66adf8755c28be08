"""A TCP proxy on the loopback that cuts connections short, and counts."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Cutter:
    """Use as a context manager.

    :param upstream: the port connections lead to; it may be set later.
    :param limit: bytes a connection may carry to the client before it is cut; 0: all.
    :param times: so often; later connections are whole.

    Attributes:
        carried: bytes that went to clients, of each connection.
        cuts: connections that were cut.
    """

    def __init__(self, upstream: int = 0, limit: int = 0, times: int = 1) -> None:
        self.upstream = upstream
        self._limit, self._times = limit, times
        self.carried: list[int] = []
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="cutter")

    def __enter__(self) -> Cutter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.send(b"x")
        self._thread.join()
        for sock in (self._stop, self._stopped, self._listener):
            sock.close()

    def _run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stopped:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fd in self._selector.get_map():  # its partner may have ended it just now
                    self._carry(key)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self.upstream), 5)
        except OSError:
            client.close()
            return
        self.carried.append(0)
        number = len(self.carried) - 1
        self._selector.register(client, selectors.EVENT_READ, (client, server, None))
        self._selector.register(server, selectors.EVENT_READ, (server, client, number))

    def _carry(self, key: selectors.SelectorKey) -> None:
        here, there, number = key.data
        try:
            data = here.recv(1 << 16)
            cut = False
            if number is not None and self._limit and self.cuts < self._times:
                left = self._limit - self.carried[number]
                cut = len(data) >= left
                data = data[:left]
            there.sendall(data)
        except OSError:
            data, cut = b"", False
        if number is not None:
            self.carried[number] += len(data)
        self.cuts += cut
        if cut or not data:
            self._drop(here, there)

    def _drop(self, *pair: socket.socket) -> None:
        for sock in pair:
            with contextlib.suppress(KeyError):
                self._selector.unregister(sock)
            sock.close()

    def _end(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, tuple):
                key.data[0].close()
        self._selector.close()
