"""A port that is reserved goes to the server that asks for it by its number, and to nothing else."""

from __future__ import annotations

import errno
import socket

import pytest

from embferry.serve.supervisor.reserved_ports import ReservedPorts

HOST = "127.0.0.1"


def test_a_reserved_port_is_taken_for_whatever_asks_for_any_port() -> None:
    """The kernel passes over a port for which a bind without ``SO_REUSEADDR`` is refused."""
    ports = ReservedPorts(HOST, 20)
    assert len(set(ports.numbers)) == 20
    assert [error_of_bind(number) for number in ports.numbers] == [errno.EADDRINUSE] * 20
    ports.release()
    assert [error_of_bind(number) for number in ports.numbers] == [0] * 20


@pytest.mark.parametrize("host", [HOST, "0.0.0.0"])
def test_a_server_listens_on_its_reserved_port_and_does_so_again_after_a_restart(host: str) -> None:
    ports = ReservedPorts(HOST, 1)
    (number,) = ports.numbers
    for _ in range(3):
        with (
            socket.create_server((host, number)) as server,
            socket.create_connection((HOST, number)) as client,
            server.accept()[0] as accepted,
        ):
            accepted.sendall(b"here")
            assert client.recv(4) == b"here"
            with pytest.raises(OSError, match="in use"):
                socket.create_server((host, number))
    ports.release()


def test_a_server_keeps_its_port_when_the_reservation_ends() -> None:
    ports = ReservedPorts(HOST, 1)
    with socket.create_server((HOST, ports.numbers[0])) as server:
        ports.release()
        ports.release()
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
            assert accepted.getpeername() == client.getsockname()


def test_a_reservation_ends_with_the_object_that_has_it() -> None:
    ports = ReservedPorts(HOST, 1)
    (number,) = ports.numbers
    assert error_of_bind(number) == errno.EADDRINUSE
    del ports
    assert error_of_bind(number) == 0


def test_nothing_stays_reserved_if_not_all_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Few(socket.socket):
        def __init__(self) -> None:
            if len(made) == 3:
                raise OSError(errno.EMFILE, "Too many open files")
            super().__init__()
            made.append(self)

    monkeypatch.setattr(socket, "socket", Few)
    with pytest.raises(OSError, match="Too many open files"):
        ReservedPorts(HOST, 5)
    assert [sock.fileno() for sock in made] == [-1] * 3


def error_of_bind(number: int) -> int:
    """Returns the number of the error with which a port is refused to a socket without ``SO_REUSEADDR``, 0 if none."""
    with socket.socket() as sock:
        try:
            sock.bind((HOST, number))
        except OSError as error:
            return error.errno or -1
    return 0
