"""The table of workers and their leases. Pure: no sockets, no clock; the time is an argument, in seconds.

A worker that does not renew its lease counts as gone. Ranks that register in SGLang's way, by ``PUT /route``, have no
lease: they stay until they register again.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from math import inf
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Raw, Struct

from embferry.protocol.errors import CapacityError, LocalProtocolError

Role = Literal["encode", "language"]

MAX_RANKS = 4096

Text = Annotated[str, Meta(max_length=512)]
Size = Annotated[int, Meta(ge=1, le=MAX_RANKS)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Address = Annotated[str, Meta(min_length=1, max_length=255)]
WorkerId = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._-]+$")]

_URL = re.compile(
    r"https?://(?:\[(?P<bracketed>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*\.?))"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/[A-Za-z0-9._~/-]*)?",
    re.IGNORECASE,
)


class Rank(Struct, frozen=True, kw_only=True):
    """Where one rank of a tensor-parallel encode engine listens; the fields of SGLang's ``PUT /route``."""

    tp_size: Size
    """Total number of ranks."""
    dp_size: Size
    """Data-parallel groups; divides ``tp_size``."""
    rank_ip: Address
    rank_port: Port
    engine_rank: Annotated[int, Meta(ge=0, lt=MAX_RANKS)]

    def __post_init__(self) -> None:
        if self.tp_size % self.dp_size:
            raise ValueError(f"dp_size {self.dp_size} does not divide tp_size {self.tp_size}")
        if self.engine_rank >= self.tp_size:
            raise ValueError(f"engine_rank {self.engine_rank} is not below tp_size {self.tp_size}")

    @property
    def place(self) -> tuple[int, int]:
        """(data-parallel group, rank within it)."""
        return divmod(self.engine_rank, self.tp_size // self.dp_size)


class Worker(Struct, frozen=True, kw_only=True):
    """One worker process, as it describes itself."""

    id: WorkerId
    """Unique for each process, so that an old process cannot end the lease of its successor."""
    role: Role
    url: Text = ""
    """URL of its HTTP server, such as ``http://10.0.0.5:8001``; empty if it has none."""
    endpoint: Text = ""
    """Endpoint for control messages, such as ``tcp://10.0.0.5:9001``."""
    model: Text = ""
    load: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """Requests in progress, as of the last renewal."""
    rank: Rank | None = None

    def __post_init__(self) -> None:
        if self.url:
            check_url(self.url)


def check_url(url: str) -> None:
    """Raises ValueError unless ``url`` is one of an HTTP server: ``http`` or ``https``, a host, maybe port and path.

    What clients parse in different ways is refused: user names, queries, escapes and characters beyond ASCII.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url[:100]!r} is not the URL of a worker; it looks like http://10.0.0.5:8001")
    if int(match["port"] or 80) not in range(1, 65536):
        raise ValueError(f"{url[:100]!r} has no port between 1 and 65535")
    address = match["bracketed"] or match["host"]
    if match["bracketed"] or not re.search(
        "[A-Za-z_-]", address.rstrip(".").rpartition(".")[2]
    ):  # no name ends in digits
        try:
            version = ipaddress.ip_address(address).version
        except ValueError as error:
            raise ValueError(f"{url[:100]!r} has no valid IP address") from error
        if (version == 6) != bool(match["bracketed"]):
            raise ValueError(f"{url[:100]!r} has an IPv4 address in brackets")


class WorkerList(Struct, frozen=True):
    """The bootstrap server's answer to ``GET /workers``, as it arrives."""

    workers: tuple[Raw, ...]
    complete: bool = True
    """Whether a worker that is not listed has gone."""

    def read(self) -> tuple[tuple[Worker, ...], Mapping[str, str]]:
        """Returns the workers whose leases are valid, and of each other lease a part of it and what is wrong.

        A server of another version may have accepted what this one refuses, and one bad lease must not hide the others.
        """
        found, dropped = [], {}
        for raw in self.workers:
            try:
                found.append(msgspec.json.decode(raw, type=Worker))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                dropped[bytes(raw)[:200].decode("ascii", "backslashreplace")] = str(error)
        return tuple(found), dropped


class LeaseTable:
    """Workers with the ends of their leases, and ranks with their addresses."""

    def __init__(self, lease_seconds: float = 5.0, max_workers: int = 1024) -> None:
        if not lease_seconds > 0:
            raise LocalProtocolError(f"lease_seconds must be greater than 0, not {lease_seconds}")
        self.lease_seconds = lease_seconds
        self.max_workers = max_workers
        self._leases: dict[str, tuple[Worker, float]] = {}
        self._ticked_at = -inf
        self._complete_from = inf
        self._ranks: dict[tuple[int, int], Rank] = {}

    def tick(self, now: float) -> None:
        """Notes that the server runs. Called before each request is handled, and a few times a lease.

        A server that has been started, or has stood still for half a lease, has missed renewals.
        """
        if now - self._ticked_at >= self.lease_seconds / 2:
            self._complete_from = now + self.lease_seconds
        self._ticked_at = now

    def is_complete(self, now: float) -> bool:
        """Returns whether every living worker has had a whole lease for its renewal, so that a missing one has gone."""
        return now >= self._complete_from

    def put(self, worker: Worker, now: float) -> bool:
        """Registers ``worker`` or renews its lease. Returns whether it is new.

        Raises:
            CapacityError: The table is full.
        """
        self.expire(now)
        new = worker.id not in self._leases
        if new and len(self._leases) >= self.max_workers:
            raise CapacityError(f"{self.max_workers} workers are registered; no other is accepted until one leaves")
        self._leases[worker.id] = (worker, now + self.lease_seconds)
        return new

    def remove(self, worker_id: str) -> bool:
        """Ends a lease. Returns whether there was one."""
        return self._leases.pop(worker_id, None) is not None

    def expire(self, now: float) -> tuple[Worker, ...]:
        """Removes and returns every worker whose lease has ended."""
        ended = tuple(worker for worker, ends in self._leases.values() if ends <= now)
        for worker in ended:
            del self._leases[worker.id]
        return ended

    def workers(self, now: float, role: Role | None = None) -> tuple[Worker, ...]:
        """Returns the workers whose lease has not ended, in order of registration."""
        live = (worker for worker, ends in self._leases.values() if ends > now)
        return tuple(worker for worker in live if role is None or worker.role == role)

    def put_rank(self, rank: Rank) -> None:
        """Registers a rank without a lease. A rank of another shape comes from a restarted engine: old ranks go."""
        self._ranks = {place: r for place, r in self._ranks.items() if _shape(r) == _shape(rank)}
        self._ranks[rank.place] = rank

    def shape(self, now: float) -> tuple[int, int] | None:
        """Returns (tp_size, dp_size) of the encode engine, or None while no rank is known."""
        return next((_shape(rank) for rank in self._known(now).values()), None)

    def route(self, engine_rank: int, target_dp_group: int, now: float) -> Rank | None:
        """Returns the rank ``engine_rank`` within data-parallel group ``target_dp_group``, or None."""
        return self._known(now).get((target_dp_group, engine_rank))

    def _known(self, now: float) -> dict[tuple[int, int], Rank]:
        leased = (worker.rank for worker in self.workers(now) if worker.rank is not None)
        return self._ranks | {rank.place: rank for rank in leased}


def _shape(rank: Rank) -> tuple[int, int]:
    return rank.tp_size, rank.dp_size
