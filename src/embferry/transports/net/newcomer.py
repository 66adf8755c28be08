"""A connection that has not introduced itself yet: a socket that is being greeted, then a connection of its owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from embferry.protocol.errors import TransportError, shown
from embferry.trust.greeting import Greeting

from .greeter import Greeter
from .loop import Scope
from .stream import Stream


class Accepted(Protocol):
    """A connection that was accepted."""

    def make_room(self, reason: str) -> bool:
        """Ends the connection, for the sake of others. Returns False if it must go on. Runs on the loop's thread."""


C = TypeVar("C", bound=Accepted)


class Newcomer(Generic[C]):
    """Loop thread only.

    Args:
        sock: Accepted; closed here as long as there is no connection.
        peer: IP address and port.

    Attributes:
        connection: The owner's connection, once the greeting is done.
    """

    def __init__(self, sock: Stream, peer: tuple[str, int]) -> None:
        self.sock, self.peer = sock, peer
        self.connection: C | None = None
        self._scope: Scope | None = None

    def greet(
        self, greeting: Greeting, loop: Scope, done: Callable[[], None], failed: Callable[[TransportError], None]
    ) -> None:
        """Greets the peer.

        Args:
            greeting: Of this connection.
            loop: Watches the socket.
            done: Called when the peer is one of the cluster; the socket is not watched any more.
            failed: Called when it is not; the socket is closed.
        """

        def fail(error: BaseException) -> None:
            self.close()
            failed(error if isinstance(error, TransportError) else TransportError(f"a bug: {shown(error)}"))

        def end() -> None:
            scope.end()
            done()

        scope = self._scope = loop.scope(fail)
        scope.run(Greeter(self.sock, scope, greeting, end, fail).start)

    def make_room(self, reason: str) -> bool:
        """Ends the connection, if its owner does not need it to go on."""
        if self.connection is not None:
            return self.connection.make_room(reason)
        self.close()
        return True

    def close(self) -> None:
        """Closes the socket, which has no owner yet."""
        if self._scope is not None:
            self._scope.end()
        self.sock.close()
