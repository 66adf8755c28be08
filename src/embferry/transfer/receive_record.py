"""The record of one transfer into this worker, as the driver keeps it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field

from msgspec import Struct

from embferry.memory.blocks import MetadataAllocation
from embferry.protocol.arguments import as_integer, as_seconds, as_text
from embferry.protocol.commands import Deliver, Restart, Verify
from embferry.protocol.errors import EmbeddingTransferError
from embferry.protocol.kept import KeptTokens
from embferry.protocol.messages import MAX_ENDPOINT, MAX_ID, MAX_TOKENS
from embferry.protocol.receiver import Receiver
from embferry.protocol.states import KVPoll, Phase

from .control.endpoint import check_endpoint
from .handle import NO_HANDLE, Handle, NoHandle
from .resume_log import ResumeLog
from .sinks import GatherSink, Sink, check_sink

NO_SINK = GatherSink()
"""Takes the place of the sink in a record that is forgotten, which does not call it any more."""


class Granted(Struct, frozen=True):
    """Tells the sink which blocks were granted for tokens from ``start`` on."""

    epoch: int
    start: int
    blocks: tuple[int, ...]


SinkCall = Granted | Verify | Deliver | Restart


@dataclass(eq=False, slots=True)
class ReceiveRecord:
    """One transfer into this worker. The manager's lock guards it, except where something else is said.

    Attributes:
        room: The ``bootstrap_room``.
        endpoint: Where the encode worker takes control messages.
        sink: Where the data goes. Its methods are called with ``sink_lock`` held, and no other lock.
        failover_timeout: Seconds for which another encode worker may be named after a loss, or None.
        max_tokens: Tokens that the caller has room for, or None.
        name: The name under which this end introduces itself.
        offer_timeout: Seconds for which an encode worker that answers may take to open the room, or None.
        kept: Tokens that the sink had when the transfer was opened, or None.
        machine: The state machine; None until the embedding is asked for.
        end: What the user holds.
        source: The session of the encode worker that was last heard; 0: none yet.
        allocation: Blocks for the initial transfer that could not be granted yet.
        latest: The blocks of the latest grant.
        epochs: The epochs of all its grants.
        calls: Calls of the sink that are to be made, in order. Only the driver thread removes any, after the call.
        restarts: How many of these are ``Restart``.
        discarded_from: The first token of the chunks that the sink was not given, because the transfer had failed.
        verification: The running verification, if the first call is one. For the driver thread.
        verified_tokens: Tokens that were verified, damaged and repeated ones included.
        is_preparing: Whether the callback thread prepares the sink; no call is made meanwhile.
        is_sink_complete: What the sink's ``is_complete`` was when it was last asked.
        log: Lines about its grants.
        delivered: Delivered chunks that the sink still reads, as (epoch, offset).
        revoking: If the machine is broken: epochs whose writer may still have access. None: not asked for yet.
        sink_lock: Held during every call of the sink. Taken before the manager's lock, never after it.
    """

    room: int
    endpoint: str
    sink: Sink
    failover_timeout: float | None
    max_tokens: int | None
    name: str
    offer_timeout: float | None
    kept: KeptTokens | None
    machine: Receiver | None = None
    end: Handle | NoHandle = field(init=False)
    source: int = 0
    allocation: MetadataAllocation | None = None
    latest: MetadataAllocation | None = None
    epochs: list[int] = field(default_factory=list)
    calls: deque[SinkCall] = field(default_factory=deque)
    restarts: int = 0
    discarded_from: int = MAX_TOKENS
    verification: Generator[None, None, bool] | None = None
    verified_tokens: int = 0
    is_preparing: bool = False
    is_sink_complete: bool = True
    log: ResumeLog = field(default_factory=ResumeLog)
    delivered: set[tuple[int, int]] = field(default_factory=set)
    revoking: set[int] | None = None
    sink_lock: threading.RLock = field(default_factory=threading.RLock)
    failure: EmbeddingTransferError | None = None
    is_broken: bool = False
    kept_until: float = 0.0

    @classmethod
    def checked(
        cls,
        room: int,
        endpoint: str,
        sink: Sink | None,
        failover_timeout: float | None,
        max_tokens: int | None,
        name: str,
        offer_timeout: float | None,
    ) -> ReceiveRecord:
        """Returns the record of a new transfer, for the arguments of :meth:`~.receive_manager.ReceiveManager.open`.

        Raises:
            LocalProtocolError: One of them is malformed.
        """
        room, endpoint = as_integer("room", room, 0, MAX_ID), check_endpoint(endpoint)
        if max_tokens is not None:
            max_tokens = as_integer("max_tokens", max_tokens, 0, MAX_TOKENS, room=room)
        if failover_timeout is not None:
            failover_timeout = as_seconds("failover_timeout", failover_timeout, room=room)
        if offer_timeout is not None:
            offer_timeout = as_seconds("offer_timeout", offer_timeout, room=room)
        name = as_text("name", name, MAX_ENDPOINT, room=room)
        sink = check_sink(sink, room)
        return cls(room, endpoint, sink, failover_timeout, max_tokens, name, offer_timeout, sink.kept)

    @property
    def error(self) -> EmbeddingTransferError | None:
        """The error with which the transfer has failed, or None."""
        if self.machine is not None and self.machine.error is not None and not self.is_broken:
            return self.machine.error
        return self.failure

    def poll(self) -> KVPoll:
        """Returns where the transfer stands. It has succeeded once the sink has everything as well."""
        if self.error is not None:
            return KVPoll.Failed
        if self.machine is None:
            return KVPoll.Bootstrapping
        state = self.machine.poll()
        if state is KVPoll.Success and (self.has_calls or not self.is_sink_complete):
            return KVPoll.Transferring
        return state

    @property
    def has_calls(self) -> bool:
        """Whether calls of the sink are to be made now.

        News of a grant waits for the first call that uses it, unless the sink is then asked whether it is complete.
        """
        if len(self.calls) == 1 and isinstance(self.calls[0], Granted):
            return type(self.sink).is_complete is not Sink.is_complete
        return bool(self.calls)

    @property
    def transferred_tokens(self) -> int:
        """Verified tokens from token 0 on without a gap that the sink has been given.

        The machine counts a chunk before that. Its blocks return to the pool if the transfer fails in between, so
        callers must not use it yet. The manager's lock is held.
        """
        if self.machine is None:
            return 0
        waiting = min((call.offset for call in self.calls if isinstance(call, Deliver)), default=MAX_TOKENS)
        return min(self.machine.transferred_tokens, waiting, self.discarded_from)

    def discard(self, chunk: Deliver) -> None:
        """The sink is not given a chunk, because the transfer has failed. The manager's lock is held."""
        self.discarded_from = min(self.discarded_from, chunk.offset)
        self.delivered.discard((chunk.epoch, chunk.offset))

    def discard_calls(self) -> None:
        """Drops the calls that have not been made. The manager's lock is held."""
        for call in self.calls:
            if isinstance(call, Deliver):
                self.discard(call)
        self.calls.clear()

    def blocks(self) -> set[int]:
        """Returns the blocks that the transfer uses or will use."""
        used = set() if self.machine is None else self.machine.ledger.blocks()
        return used | set(() if self.allocation is None else self.allocation.blocks)

    def let_go(self) -> None:
        """The manager has forgotten the record: ends references that lead back to it."""
        self.end.let_go()
        self.end, self.sink = NO_HANDLE, NO_SINK

    def history(self) -> list[str]:
        """Returns the last events of the machine, a line each."""
        return [] if self.machine is None else self.machine.history.lines()

    @property
    def discards(self) -> bool:
        """Whether data that arrives is of no use any more."""
        return self.failure is not None or self.machine is None or self.machine.phase is Phase.FAILED
