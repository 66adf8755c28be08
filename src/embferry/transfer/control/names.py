"""Host names to IP addresses, without blocking the driver."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable

Addresses = list[tuple[str, int]]
Done = Callable[[Addresses | OSError], None]

MAX_LOOKUPS = 8


class Resolver:
    """Asks the system for addresses, on daemon threads that last as long as a lookup: each may block for a minute.

    Args:
        call: Runs a function on the driver's thread; may be called from any.
    """

    def __init__(self, call: Callable[[Callable[[], None]], None]) -> None:
        self._call = call
        self._waiting: deque[tuple[str, int, Done]] = deque()
        self._running = 0

    def resolve(self, host: str, port: int, done: Done) -> None:
        """Looks ``host`` up and calls ``done`` on the driver's thread, with its addresses or the error."""
        self._waiting.append((host, port, done))
        self._start()

    def _start(self) -> None:
        while self._waiting and self._running < MAX_LOOKUPS:
            host, port, done = self._waiting.popleft()
            thread = threading.Thread(target=self._look_up, args=(host, port, done), name="embferry-name", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no threads are left
                done(OSError(str(error)))
            else:
                self._running += 1

    def _look_up(self, host: str, port: int, done: Done) -> None:
        found: Addresses | OSError
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = list(dict.fromkeys((str(entry[4][0]), port) for entry in entries))
        except OSError as error:  # socket.gaierror too
            found = error
        except UnicodeError as error:  # of the codec for international names
            found = OSError(str(error))
        self._call(lambda: self._finish(done, found))

    def _finish(self, done: Done, found: Addresses | OSError) -> None:
        self._running -= 1
        self._start()
        done(found)
