"""Whether the ports of a deployment are free, asked before any process starts: each would find out by itself later."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

from embferry.serve.config import AUTO, Settings
from embferry.serve.http.address import address_of


class Wanted(NamedTuple):
    """A port that a process will listen on.

    Attributes:
        name: the process and, where it has several ports, its use.
        host: the setting's value.
        place: how the user has named the setting of the port.
        may_be_any: whether 0 takes a free port.
    """

    name: str
    host: str
    port: int
    place: str
    may_be_any: bool = True


def problems(settings: Settings, wanted: list[Wanted]) -> list[str]:
    """Returns one sentence for each address or port that is not available. It says what to do."""
    found: list[str] = []
    taken: dict[tuple[str, int], Wanted] = {}
    for one in wanted:
        try:
            address = address_of(one.host)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            return [f"{settings.place('host')} {one.host} has no address: {why}"]
        if one.port and (other := taken.setdefault((address, one.port), one)) is not one:
            found.append(f"{other.name} ({other.place}) and {one.name} ({one.place}) want the same port {one.port}")
            continue
        error_number = _bind(address, one.port)
        if error_number == errno.EADDRNOTAVAIL:
            return [
                f"{settings.place('host')} {one.host}: this machine has no such address; 0.0.0.0 stands for all it has"
            ]
        if error_number:
            found.append(_sentence(one, error_number))
    return found


def wanted_router(settings: Settings) -> Wanted:
    """Returns the port of the router."""
    return Wanted("the router", settings.host, settings.router.port, settings.place("router", "port"))


def wanted_local(settings: Settings, inner_host: str) -> Iterator[Wanted]:
    """Yields the ports of all processes of this project on one machine.

    Args:
        settings: of the deployment.
        inner_host: the host on which all but the router listen.
    """
    yield Wanted("the bootstrap server", inner_host, settings.bootstrap.port, settings.place("bootstrap", "port"))
    yield wanted_router(settings)
    numbers = {"encode": settings.serve.encode_workers, "language": settings.serve.language_workers}
    for role, port in (("encode", settings.encode.port), ("language", settings.language.port)):
        for number in range(numbers[role] if port else 0):
            yield Wanted(f"{role}-{number}", inner_host, port + number, settings.place(role, "port"))
    transfer = settings.transfer
    if transfer.http_port and {"http", AUTO} & set(transfer.transports):
        for number in range(numbers["encode"]):
            port, place = transfer.http_port + number, settings.place("transfer", "http_port")
            yield Wanted(f"the http transport of encode-{number}", inner_host, port, place)


def _bind(address: str, port: int) -> int:
    """Returns the number of the error with which the port cannot be had, 0 if it can. It is free again afterwards."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OverflowError:  # of several workers, the last ones have ports beyond 65535
        return errno.EINVAL
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _sentence(one: Wanted, number: int) -> str:
    if number == errno.EADDRINUSE:
        advice = "end the process that has it, or choose another"
        free = " (0 takes a free one)" if one.may_be_any else ""
        return f"port {one.port} of {one.name} is taken; {advice} with {one.place}{free}"
    if number == errno.EACCES:
        return f"port {one.port} of {one.name} is for root alone; choose one of 1024 or more with {one.place}"
    return f"{one.name} cannot listen on {one.host}:{one.port}: {os.strerror(number)}; see {one.place}"
