"""The scheduler's end of the way to other hosts: sends each embedding once to every host with ranks that load it."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from embferry import (
    EmbeddingSender,
    EmbeddingTransferError,
    KVPoll,
    Layout,
    SendManager,
    TransferSettings,
    TransportError,
    as_fields,
)
from embferry.transfer.failures import as_transfer_error, attempt

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import digest_of
from ..shared.shared_rows import SharedRows
from .config import ConnectorConfig
from .host_claims import host_of, in_slices, slices

log = logging.getLogger(__name__)

CLAIM_S = 3.0
"""How long a claim is used after its host has repeated it last. A host that runs repeats it each second."""
MAX_CLAIMS = 64
"""Claims that are remembered for each host."""
MAX_USED = 1024
"""Rooms of claims that are remembered beyond their use. A claim may be reported once more, late."""
HOST_S = 10.0
"""How long a host may be silent while an embedding waits for a claim of it."""


class Dropped(msgspec.Struct, frozen=True):
    """Memory on another host that the scheduler needs no longer.

    Attributes:
        room: In which it was received.
        number: The latest load of it, which the ranks there may still have to do.
    """

    room: int
    number: int


@dataclass(slots=True)
class _Claim:
    host: int
    manager: SendManager
    heard_at: float


@dataclass(eq=False, slots=True)
class _Delivery:
    """The transfer of an embedding to one host. Without a room it waits for a claim."""

    host: int
    since: float
    room: int = 0
    sender: EmbeddingSender | None = None
    is_done: bool = False


@dataclass(eq=False, slots=True)
class _Sending:
    rows: SharedRows
    on_end: Callable[[], object]
    deliveries: list[_Delivery]
    error: EmbeddingTransferError | None = None
    is_withdrawn: bool = False

    @property
    def is_done(self) -> bool:
        return all(delivery.is_done for delivery in self.deliveries)


@dataclass(slots=True)
class _Host:
    heard_at: float
    claims: OrderedDict[int, _Claim] = field(default_factory=OrderedDict)  # by room, the latest last
    used: OrderedDict[int, None] = field(default_factory=OrderedDict)  # rooms of earlier claims


class OtherHosts:
    """Hosts 1 to ``hosts`` - 1 of one engine, as its scheduler sees them. Any thread may call the methods.

    A transfer ends with success when the whole embedding is verified there and every rank there has mapped it.
    """

    def __init__(self, config: ConnectorConfig, hosts: int, hidden: int, dtype: str, counters: Counters) -> None:
        """Starts to listen. ``hidden`` and ``dtype`` are those of the model.

        Raises:
            TransportError: The port is taken.
        """
        self._config, self._hidden = config, hidden
        self._lock = threading.Lock()  # guards the three below
        self._hosts = {host: _Host(time.monotonic()) for host in range(1, hosts)}
        self._sendings: dict[int, _Sending] = {}  # by key, in the order of their begin
        self._dropped: list[Dropped] = []
        self._layout = slices(hidden, dtype)
        self._managers: Managers[SendManager] = Managers(self._new_manager, counters)
        self._managers.get(self._layout)

    def send(self, rows: SharedRows, on_end: Callable[[], object]) -> None:
        """Sends a complete embedding to every host, once.

        ``on_end`` is called without locks when :meth:`is_there` becomes true or raises, but for the silence of a host.
        It may not block.
        """
        now = time.monotonic()
        with self._lock:
            if rows.key in self._sendings:
                return
            deliveries = [_Delivery(host, now) for host in self._hosts]
            self._sendings[rows.key] = _Sending(rows, on_end, deliveries)
        self._serve()

    def is_there(self, rows: SharedRows) -> bool:
        """Returns whether every rank on another host has mapped the embedding.

        Raises:
            EmbeddingTransferError: It cannot be brought to a host.
        """
        with self._lock:
            sending = self._sendings.get(rows.key)
            if sending is None:
                return False
            if sending.error is None:
                sending.error = self._silence(sending)
            if sending.error is not None:
                raise sending.error
            return sending.is_done

    def rooms(self, rows: SharedRows) -> tuple[int, ...]:
        """Returns the names of the embedding on hosts 1, 2 and so on."""
        with self._lock:
            return tuple(delivery.room for delivery in self._sendings[rows.key].deliveries)

    def withdraw(self, key: int) -> None:
        """The scheduler does not need this embedding any more. Its latest load is complete on this host."""
        with self._lock:
            sending = self._sendings.pop(key, None)
            if sending is None:
                return
            sending.is_withdrawn = True
            began = [delivery for delivery in sending.deliveries if delivery.sender is not None]
            self._dropped += [Dropped(delivery.room, sending.rows.latest_load) for delivery in began]
        for delivery in began:
            if delivery.sender is not None:
                delivery.sender.abort()

    def dropped(self, *, repeat: bool) -> tuple[Dropped, ...]:
        """Returns what the hosts are to drop. With ``repeat``, it is returned again: this step may have no effect."""
        with self._lock:
            dropped = tuple(self._dropped)
            if not repeat:
                self._dropped.clear()
        return dropped

    def close(self) -> None:
        self._managers.close()

    def _silence(self, sending: _Sending) -> EmbeddingTransferError | None:
        """Returns an error if a host has made no claim for too long and fetches nothing. The lock is held."""
        now = time.monotonic()
        busy = {
            delivery.host
            for other in self._sendings.values()
            for delivery in other.deliveries
            if delivery.room and not delivery.is_done and other.error is None
        }
        for delivery in sending.deliveries:
            heard = max(delivery.since, self._hosts[delivery.host].heard_at)
            if not delivery.room and delivery.host not in busy and now > heard + HOST_S:
                why = f"host {delivery.host} of this engine has asked for no embedding within {HOST_S:g} s"
                return TransportError(f"{why}; does it run, and reach port {self._config.ranks_port} here?")
        return None

    # Claims

    def _requested(self, manager: SendManager, room: int, name: str) -> None:
        """Remembers a claim. Runs on the manager's callback thread without locks."""
        number = host_of(name)
        now = time.monotonic()
        with self._lock:
            host = None if number is None else self._hosts.get(number)
            if host is None or number is None:
                log.warning("a stranger asks for an embedding of this engine: %s", name)
                return
            host.heard_at = now
            if room in host.used:
                return
            host.claims[room] = _Claim(number, manager, now)
            host.claims.move_to_end(room)
            while len(host.claims) > MAX_CLAIMS:
                host.claims.popitem(last=False)
        self._serve()

    def _serve(self) -> None:
        """Gives claims to the embeddings that wait, the oldest first."""
        begun: list[tuple[_Sending, _Delivery, SendManager]] = []
        with self._lock:
            for sending in self._sendings.values():
                for delivery in sending.deliveries:
                    if delivery.room or sending.error is not None:
                        continue
                    if (claim := self._take_claim(delivery.host)) is not None:
                        delivery.room, manager = claim
                        begun.append((sending, delivery, manager))
        for sending, delivery, manager in begun:
            if (error := attempt(self._begin, sending, delivery, manager)) is not None:
                self._fail(sending, delivery, error)

    def _take_claim(self, host: int) -> tuple[int, SendManager] | None:
        """Returns room and manager of the latest claim of a host that is alive. The lock is held."""
        claims, used = self._hosts[host].claims, self._hosts[host].used
        while claims:
            room, claim = claims.popitem()
            used[room] = None
            if len(used) > MAX_USED:
                used.popitem(last=False)
            if claim.manager.fault is None and time.monotonic() <= claim.heard_at + CLAIM_S:
                return room, claim.manager
        return None

    def _begin(self, sending: _Sending, delivery: _Delivery, manager: SendManager) -> None:
        shape = in_slices(sending.rows.shape, self._hidden)
        sender = manager.open(delivery.room)
        with self._lock:
            is_withdrawn = sending.is_withdrawn
            delivery.sender = sender
        if is_withdrawn:
            sender.abort()
            return
        sender.on_change(partial(self._changed, sending, delivery))
        rows = sending.rows.rows.reshape(shape.tokens, shape.token_bytes)
        sender.init(shape.tokens, digest_of(rows, shape))
        sender.send_embedding(as_fields({"input_embeddings": rows}))
        self._changed(sending, delivery)  # it may have ended before it could be watched

    def _changed(self, sending: _Sending, delivery: _Delivery) -> None:
        """Notes the end of a transfer. Runs on the manager's callback thread or the caller's, without locks."""
        assert delivery.sender is not None
        try:
            status = delivery.sender.poll()
            error = delivery.sender.failure_exception() if status is KVPoll.Failed else None
        except EmbeddingTransferError as stopped:  # the manager is closed, or has failed
            status, error = KVPoll.Failed, stopped
        if error is not None:
            self._fail(sending, delivery, error)
        elif status is KVPoll.Success:
            with self._lock:
                has_ended = not delivery.is_done
                delivery.is_done = True
                has_ended = has_ended and sending.is_done
            if has_ended:
                attempt(sending.on_end)

    def _fail(self, sending: _Sending, delivery: _Delivery, raised: Exception) -> None:
        cause = as_transfer_error("sending the embedding", raised)
        error = TransportError(f"host {delivery.host} of this engine cannot take an embedding: {cause.detail}")
        with self._lock:
            if sending.error is not None or delivery.is_done:
                return
            sending.error = error
            is_withdrawn = sending.is_withdrawn
        if not is_withdrawn:
            log.error("%s", error)
            attempt(sending.on_end)

    def _new_manager(self, layout: Layout) -> SendManager:
        config = self._config
        manager = SendManager(
            layout,
            config.make_transports(),
            host=config.host,
            port=config.ranks_port or 0,
            settings=TransferSettings(
                bootstrap_timeout=HOST_S,
                lease_timeout=10 * config.peer_timeout,
                peer_timeout=config.peer_timeout,
            ),
            trust=config.trust,
        )
        manager.on_request(partial(self._requested, manager))
        return manager
