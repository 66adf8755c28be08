"""Ports that nothing else on this machine takes before the process that they are meant for listens on them.

An engine loads for a minute before it listens. A port that was merely free when it was chosen may by then be the end of
a connection, or another program's: the kernel gives it to the next one that asks for any port.
"""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable


class ReservedPorts:
    """Free ports of one address, reserved until :attr:`release` is called or this object is gone.

    A socket that is bound, does not listen and has ``SO_REUSEADDR`` keeps the kernel from choosing its port for
    anything else (Linux, ``inet_csk_find_open_port``). A server that asks for this very port still gets it, if it sets
    ``SO_REUSEADDR`` as servers do; so it does again after a restart.

    Args:
        host: an IPv4 address of this machine.
        count: how many ports.

    Raises:
        OSError: there are no ``count`` free ports, or the process may have no more descriptors.
    """

    def __init__(self, host: str, count: int) -> None:
        held: list[socket.socket] = []
        self.release: Callable[[], object] = weakref.finalize(self, _close, held)
        """Lets others have the ports. Servers that listen on them keep them."""
        try:
            for _ in range(count):
                held.append(sock := socket.socket())
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((host, 0))
        except OSError:
            self.release()
            raise
        self.numbers: list[int] = [sock.getsockname()[1] for sock in held]


def _close(held: list[socket.socket]) -> None:
    while held:
        held.pop().close()
