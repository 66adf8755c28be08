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
    LeaseExpired,
    LocalProtocolError,
    SendManager,
    TransferSettings,
    TransportError,
    as_fields,
)
from embferry.transfer.failures import as_transfer_error, attempt
from embferry.trust.occasions import Occasions, more

from ..shared.counters import Counters
from ..shared.managers import Managers
from ..shared.shape import digest_of
from ..shared.shared_rows import SharedRows
from .config import ConnectorConfig
from .host_claims import HostClaim, host_of, in_slices, slices

log = logging.getLogger(__name__)

CLAIM_S = 3.0
"""How long a claim is used after its host has repeated it last, and how long a transfer waits for the next time.

A host that runs repeats its claims each second.
"""
MAX_DEAD_CLAIMS = 3
"""Claims in a row that come to nothing before an embedding fails: their host had just made them, and is gone."""
MAX_CLAIMS = 64
"""Claims that are remembered for each host."""
MAX_SERVED = 1024
"""Rooms of served claims that are remembered. One may be reported once more, late."""
HOST_S = 10.0
"""How long an embedding waits for a claim of a host that makes none and fetches nothing."""


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
    manager: SendManager
    heard_at: float


@dataclass(eq=False, slots=True)
class _Delivery:
    """The transfer of an embedding to one host. Without a room it waits for a claim."""

    host: int
    since: float
    room: int = 0
    sender: EmbeddingSender | None = None
    dead_claims: int = 0
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
    """A host with ranks.

    Attributes:
        heard_at: When it last made or repeated a claim that is not served yet, or had taken an embedding.
        claims: Those that are not served yet, by room, the latest last.
        served: Rooms of claims that were served.
    """

    heard_at: float
    claims: OrderedDict[int, _Claim] = field(default_factory=OrderedDict)
    served: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def hear(self, room: int, manager: SendManager) -> None:
        """Remembers a claim that is made or repeated."""
        if room in self.served:
            return
        self.heard_at = time.monotonic()
        self.claims[room] = _Claim(manager, self.heard_at)
        self.claims.move_to_end(room)
        while len(self.claims) > MAX_CLAIMS:
            self.claims.popitem(last=False)

    def take(self) -> tuple[int, SendManager] | None:
        """Returns room and manager of the latest claim, to be served.

        Claims that were not repeated lately are forgotten. If the host is there nevertheless, it repeats them.
        """
        now = time.monotonic()
        while self.claims:
            room, claim = self.claims.popitem()
            if now <= claim.heard_at + CLAIM_S and attempt(claim.manager.check) is None:
                self.served[room] = None
                if len(self.served) > MAX_SERVED:
                    self.served.popitem(last=False)
                return room, claim.manager
        return None


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
        self._lock = threading.Lock()  # guards the six below
        self._secret: str | None = None
        self._strangers, self._failures = Occasions(), Occasions()
        self._hosts = {host: _Host(time.monotonic()) for host in range(1, hosts)}
        self._sendings: dict[int, _Sending] = {}  # by key, in the order of their begin
        self._dropped: list[Dropped] = []
        self._layout = slices(hidden, dtype)
        self._managers: Managers[SendManager] = Managers(self._new_manager, counters)
        self._managers.get(self._layout)

    def admit(self, secret: str) -> None:
        """From now on, serves the claims of hosts that know the secret of this start of the engine."""
        with self._lock:
            self._secret = secret

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
        self._listen()
        self._serve()

    def is_there(self, rows: SharedRows) -> bool:
        """Returns whether every rank on another host has mapped the embedding.

        Raises:
            EmbeddingTransferError: It cannot be brought to a host.
        """
        with self._lock:
            sending = self._sendings.get(rows.key)
            if sending is None or sending.is_done:
                return sending is not None
            sending.error = sending.error or self._silence(sending)
            if sending.error is not None:
                raise sending.error
        self._listen()
        return False

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

    def _listen(self) -> None:
        """Replaces the manager if it has failed. Its port may be in use for a moment, so this is called repeatedly."""
        error = attempt(self._managers.get, self._layout)
        if error is None or isinstance(error, LocalProtocolError):  # the engine is shutting down
            return
        with self._lock:
            count = self._failures.count("")
        if count is not None:
            log.error("cannot listen for the other hosts of this engine: %s%s", error, more(count))

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
        with self._lock:
            if self._secret is None:
                return  # the ranks beside the scheduler are still starting; hosts repeat their claims
            number = host_of(HostClaim(room, name), self._secret)
            host = None if number is None else self._hosts.get(number)
            if host is None:
                self._report_stranger(name)
                return
            host.hear(room, manager)
        self._serve()

    def _report_stranger(self, name: str) -> None:
        """Logs a claim of no host of this engine, once a minute. The lock is held."""
        if (count := self._strangers.count("")) is not None:
            why = "it belongs to another engine, or to an earlier start of this one"
            log.warning("a host that calls itself %r gets no embedding: %s%s", name, why, more(count))

    def _serve(self) -> None:
        """Gives claims to the embeddings that wait, the oldest first."""
        begun: list[tuple[_Sending, _Delivery, SendManager]] = []
        with self._lock:
            for sending in self._sendings.values():
                waiting = [] if sending.error is not None else [one for one in sending.deliveries if not one.room]
                for delivery in waiting:
                    if (claim := self._hosts[delivery.host].take()) is not None:
                        delivery.room, manager = claim
                        begun.append((sending, delivery, manager))
        for sending, delivery, manager in begun:
            if (error := attempt(self._begin, sending, delivery, manager)) is not None:
                self._fail(sending, delivery, error)

    def _begin(self, sending: _Sending, delivery: _Delivery, manager: SendManager) -> None:
        shape = in_slices(sending.rows.shape, self._hidden)
        sender = manager.open(delivery.room)
        with self._lock:
            is_withdrawn = sending.is_withdrawn
            delivery.sender = sender
        if is_withdrawn:
            sender.abort()
            return
        sender.on_change(partial(self._changed, sending, delivery, sender))
        rows = sending.rows.rows.reshape(shape.tokens, shape.token_bytes)
        sender.init(shape.tokens, digest_of(rows, shape))
        sender.send_embedding(as_fields({"input_embeddings": rows}))
        self._changed(sending, delivery, sender)  # it may have ended before it could be watched

    def _changed(self, sending: _Sending, delivery: _Delivery, sender: EmbeddingSender) -> None:
        """Notes the end of a transfer. Runs on the manager's callback thread or the caller's, without locks."""
        try:
            status = sender.poll()
            error = sender.failure_exception() if status is KVPoll.Failed else None
        except EmbeddingTransferError as stopped:  # the manager is closed, or has failed
            status, error = KVPoll.Failed, stopped
        if isinstance(error, LeaseExpired) and not sender.machine.destinations:
            self._claim_again(sending, delivery, sender)
        elif error is not None:
            self._fail(sending, delivery, error)
        elif status is KVPoll.Success:
            with self._lock:
                has_ended = not delivery.is_done
                delivery.is_done = True
                self._hosts[delivery.host].heard_at = time.monotonic()
                has_ended = has_ended and sending.is_done
            if has_ended:
                attempt(sending.on_end)

    def _claim_again(self, sending: _Sending, delivery: _Delivery, sender: EmbeddingSender) -> None:
        """Lets an embedding wait for another claim. The host of its claim was gone, and may be back."""
        with self._lock:
            if delivery.sender is not sender:
                return  # called before
            delivery.dead_claims += 1
            waits = delivery.dead_claims < MAX_DEAD_CLAIMS
            if waits:
                delivery.room, delivery.sender = 0, None
        if waits:
            self._serve()
        else:
            why = f"{MAX_DEAD_CLAIMS} claims of it came to nothing; is the network between the hosts interrupted?"
            self._fail(sending, delivery, TransportError(why))

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
                bootstrap_timeout=CLAIM_S,
                lease_timeout=10 * config.peer_timeout,
                peer_timeout=config.peer_timeout,
            ),
            trust=config.trust,
        )
        manager.on_request(partial(self._requested, manager))
        return manager
