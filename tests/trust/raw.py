"""Plain sockets that greet as a part without a key does."""

from __future__ import annotations

import secrets
import socket

from embferry.trust.greeting import HELLO, NONCE_BYTES, Channel, Greeting, Role


def hello(channel: Channel, role: Role = Role.DIALER) -> bytes:
    """Returns the hello of a part without a key. What follows it may be sent with it."""
    return Greeting(role, channel, (), secrets.token_bytes(NONCE_BYTES)).hello


def read_hello(sock: socket.socket) -> bytes:
    """Reads the hello of the other end. Returns less than a whole one if the other end hangs up."""
    received = b""
    while len(received) < HELLO.size and (part := sock.recv(HELLO.size - len(received))):
        received += part
    return received


def greet(sock: socket.socket, channel: Channel, role: Role = Role.DIALER) -> socket.socket:
    """Greets the other end of ``sock``, which has no key either. Returns ``sock``."""
    sock.sendall(hello(channel, role))
    read_hello(sock)
    return sock
