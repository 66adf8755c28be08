"""The driver with one of its guards taken out. Each is caught by a story."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from embferry.protocol.errors import TransportError
from embferry.protocol.messages import Abort
from embferry.protocol.states import TERMINAL, KVPoll
from embferry.transfer import (
    callbacks,
    device_sink,
    guarded_transport,
    manager,
    receive_manager,
    send_record,
    sink_calls,
    staging,
    writer,
)
from embferry.transfer.callbacks import Notifier
from embferry.transfer.control_messages import ControlMessages
from embferry.transfer.guarded_transport import GuardedTransport
from embferry.transfer.manager import Manager
from embferry.transfer.parked import ParkedRequests
from embferry.transfer.ready_queue import ReadyQueue
from embferry.transfer.receive_handle import _SinkOwner
from embferry.transfer.receive_manager import ReceiveManager
from embferry.transfer.receive_record import ReceiveRecord
from embferry.transfer.send_handle import EmbeddingSender
from embferry.transfer.send_manager import SendManager
from embferry.transfer.send_record import SendRecord
from embferry.transfer.sink_calls import SinkCalls
from embferry.transfer.staging import Staging
from embferry.transfer.unclosed_blocks import UnclosedBlocks
from embferry.transfer.writer import Writer
from embferry.transports.contract import Revoked, Written

Mutate = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutate] = {}


def mutant(mutate: Mutate) -> Mutate:
    MUTANTS[mutate.__name__] = mutate
    return mutate


def _let_through(call: Callable[..., object], *arguments: object, **keywords: object) -> None:
    call(*arguments, **keywords)


def _without_guard(module: Any) -> Mutate:
    return lambda patch: patch.setattr(module, "attempt", _let_through)


GUARDED = (callbacks, device_sink, guarded_transport, manager, receive_manager, sink_calls, staging, writer)
for _module in GUARDED:
    MUTANTS[f"exceptions_pass_the_guard_of_{_module.__name__.rpartition('.')[2]}"] = _without_guard(_module)


def _without(owner: type, name: str, result: Any = None) -> Mutate:
    return lambda patch: patch.setattr(owner, name, lambda *_, **__: result)


MUTANTS |= {
    "parked_requests_do_not_expire": _without(ParkedRequests, "expire"),
    "nothing_is_due_for_parked_requests": lambda patch: patch.setattr(SendManager, "_next_due", Manager._next_due),
    "blocks_of_another_transfer_of_the_room_are_freed": _without(ReceiveManager, "_blocks_of_others", set()),
    "a_source_that_cannot_be_read_fails_nothing": _without(Writer, "_source_failed"),
    "tokens_count_before_the_sink_has_them": lambda patch: patch.setattr(
        ReceiveRecord,
        "transferred_tokens",
        property(lambda self: self.machine.transferred_tokens if self.machine else 0),
    ),
    "a_checksum_in_steps_gets_one_turn": _without(SendManager, "_has_work", False),
    "waiters_are_not_woken": _without(Notifier, "fire"),
    "timers_do_not_expire": _without(ReadyQueue, "is_due", False),
}


@mutant
def a_lost_transport_fails_what_is_admitted_to_it(patch: pytest.MonkeyPatch) -> None:
    def admit(self: ReceiveManager, record: ReceiveRecord, machine: Any, command: Any, now: float) -> None:
        if self.transports[command.transport].lost is not None:
            machine.abort(self.transports[command.transport].lost, now)
        real(self, record, machine, command, now)

    real = ReceiveManager._admit
    patch.setattr(ReceiveManager, "_admit", admit)


@mutant
def chunks_that_staging_has_not_copied_never_end(patch: pytest.MonkeyPatch) -> None:
    def close(self: Staging[Any]) -> None:
        self._waiting.clear()
        self._copier.shutdown()

    patch.setattr(Staging, "close", close)


@mutant
def writes_do_not_end_if_close_raises(patch: pytest.MonkeyPatch) -> None:
    def close(self: GuardedTransport) -> None:
        self.lost = self.lost or TransportError("this worker is shutting down")
        self._transport.close()
        self._take_events()
        self.is_closed = True
        self._all_ended()

    patch.setattr(GuardedTransport, "close", close)


@mutant
def abort_of_a_record_does_nothing_at_close(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveManager, "_abort", lambda *_: None)
    patch.setattr(ReceiveManager, "_finish", lambda *_: False)


@mutant
def revoked_is_reported_although_close_failed(patch: pytest.MonkeyPatch) -> None:
    real = GuardedTransport._all_ended

    def all_ended(self: GuardedTransport) -> None:
        self.is_closed = True
        real(self)

    patch.setattr(GuardedTransport, "_all_ended", all_ended)


@mutant
def written_is_reported_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GuardedTransport, "_take", lambda self, event: self._events.append(event))


@mutant
def revoked_is_not_reported_for_a_lost_transport(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GuardedTransport, "_all_ended", lambda self: self._wake())


@mutant
def success_before_the_sink_is_complete(patch: pytest.MonkeyPatch) -> None:
    def poll(self: ReceiveRecord) -> KVPoll:
        if self.error is not None:
            return KVPoll.Failed
        return KVPoll.Bootstrapping if self.machine is None else self.machine.poll()

    patch.setattr(ReceiveRecord, "poll", poll)


@mutant
def nothing_is_committed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_SinkOwner, "commit", lambda self: self._record.machine is not None and not self._record.restarts)


@mutant
def sinks_are_called_with_the_lock_held(patch: pytest.MonkeyPatch) -> None:
    real = ReceiveManager._work

    def work(self: ReceiveManager, record: ReceiveRecord, now: float) -> None:
        with self.lock:
            real(self, record, now)

    patch.setattr(ReceiveManager, "_work", work)


@mutant
def callbacks_run_where_the_change_was_made(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Manager, "run_callback", lambda self, call: call())

    def touch(self: Manager[Any], record: Any) -> None:
        with self.lock:
            self.ready_queue.touch(record)
            if record.end.has_changed():
                record.end.notify()
        self.wake()

    patch.setattr(Manager, "touch", touch)


@mutant
def blocks_of_a_broken_record_are_freed_before_their_writer_is_out(patch: pytest.MonkeyPatch) -> None:
    real = ReceiveManager._tear_down

    def tear_down(self: ReceiveManager, record: ReceiveRecord, now: float) -> None:
        real(self, record, now)
        if record.revoking:
            record.revoking.clear()
            real(self, record, now)

    patch.setattr(ReceiveManager, "_tear_down", tear_down)


@mutant
def a_broken_record_is_driven_on(patch: pytest.MonkeyPatch) -> None:
    def guard(self: Manager[Any], record: Any, call: Callable[..., object], *arguments: object) -> None:
        manager.attempt(call, *arguments)

    patch.setattr(Manager, "guard", guard)


@mutant
def a_broken_record_is_not_torn_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveManager, "_tear_down", lambda *_: None)


@mutant
def a_broken_record_of_a_sender_is_not_torn_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SendManager, "_tear_down", lambda *_: None)


@mutant
def a_broken_record_waits_for_chunks_that_no_sink_has(patch: pytest.MonkeyPatch) -> None:
    real = ReceiveManager._tear_down

    def tear_down(self: ReceiveManager, record: ReceiveRecord, now: float) -> None:
        if record.revoking is None:
            record.calls.clear()
        real(self, record, now)

    patch.setattr(ReceiveManager, "_tear_down", tear_down)


@mutant
def a_write_ends_before_its_checksum_is_taken(patch: pytest.MonkeyPatch) -> None:
    def written(self: Writer, event: Written) -> None:
        self._finish(self._writing.pop(event.ticket), event.error)

    patch.setattr(Writer, "written", written)


@mutant
def checksums_of_writes_that_have_failed_are_kept(patch: pytest.MonkeyPatch) -> None:
    real = Writer.written

    def written(self: Writer, event: Written) -> None:
        if event.error is not None:
            self._writing[event.ticket].steps = None
        real(self, event)

    patch.setattr(Writer, "written", written)


@mutant
def checksums_of_device_memory_are_not_taken(patch: pytest.MonkeyPatch) -> None:
    real = Writer._staged

    def staged(self: Writer, copied: Any) -> None:
        due, self._checksum_due = self._checksum_due, lambda record: None
        real(self, copied)
        self._checksum_due = due

    patch.setattr(Writer, "_staged", staged)


@mutant
def checksums_of_transfers_that_have_failed_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writer, "next_checksum", lambda self, record: None if record.error else self._first(record))


@mutant
def the_embedding_is_released_while_it_is_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EmbeddingSender, "source_released", property(lambda self: self._record.machine.phase in TERMINAL))


@mutant
def a_broken_sender_releases_its_source_at_once(patch: pytest.MonkeyPatch) -> None:
    real = SendRecord.is_released.fget
    assert real is not None
    patch.setattr(SendRecord, "is_released", property(lambda self: self.is_broken or real(self)))


@mutant
def a_failed_sink_is_called_on(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReceiveRecord, "discards", property(lambda self: False))


@mutant
def calls_of_a_failed_sink_are_dropped_with_their_blocks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SinkCalls, "_discard", lambda self, record, call, now: self._done(record))


@mutant
def the_sink_is_asked_without_its_lock(patch: pytest.MonkeyPatch) -> None:
    def ask(record: ReceiveRecord) -> None:
        record.is_sink_complete = record.sink.is_complete

    patch.setattr(SinkCalls, "_ask_sink", staticmethod(ask))


@mutant
def the_sink_is_prepared_on_the_driver_thread_and_locked(patch: pytest.MonkeyPatch) -> None:
    def prepare(self: SinkCalls, record: ReceiveRecord, check: Any, total: int) -> None:
        with self._manager.lock, record.sink_lock:
            record.sink.prepare(check, total)

    patch.setattr(SinkCalls, "_prepare", prepare)


@mutant
def parked_requests_have_no_bound(patch: pytest.MonkeyPatch) -> None:
    real = ParkedRequests.add

    def add(self: ParkedRequests, peer: Any, frame: Any, now: float) -> None:
        class Endless:
            parked_requests = parked_bytes = 1 << 40
            bootstrap_timeout = self._settings.bootstrap_timeout

        settings, self._settings = self._settings, Endless()  # type: ignore[assignment]
        real(self, peer, frame, now)
        self._settings = settings

    patch.setattr(ParkedRequests, "add", add)


@mutant
def every_session_that_writes_to_a_room_is_kept(patch: pytest.MonkeyPatch) -> None:
    real = SendManager._settle

    def settle(self: SendManager, record: SendRecord, now: float) -> None:
        kept = dict(record.peers)
        real(self, record, now)
        record.peers.update(kept)

    patch.setattr(SendManager, "_settle", settle)


@mutant
def a_revocation_frees_the_blocks_at_once(patch: pytest.MonkeyPatch) -> None:
    real = GuardedTransport.revoke

    def revoke(self: GuardedTransport, epoch: int) -> None:
        real(self, epoch)
        self._take(Revoked(epoch))
        self._wake()

    patch.setattr(GuardedTransport, "revoke", revoke)


@mutant
def the_control_plane_may_not_raise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ControlMessages, "call", lambda self, call, *arguments: call(*arguments))


@mutant
def blocks_that_a_broken_transport_may_write_are_released(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(UnclosedBlocks, "keep", lambda self, blocks, room: blocks)


@mutant
def transports_are_never_closed_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GuardedTransport, "close_again", lambda self: None)


@mutant
def messages_of_the_last_receiver_of_a_room_count(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(send_record, "deque", lambda maxlen: deque(maxlen=0))


@mutant
def broken_records_answer_each_other(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: Manager[Any], record: Any, peer: Any, session: int, frame: Any) -> None:
        if record.failure is not None and frame.source:
            self.send(peer, session, frame.source, Abort.because_of(record.failure, record.room))

    patch.setattr(Manager, "refuse", refuse)


@mutant
def transports_are_lost_by_the_failure_of_one_peer(patch: pytest.MonkeyPatch) -> None:
    def per_peer(self: GuardedTransport, name: str, call: Callable[[bytes], None], argument: bytes) -> None:
        call(argument)

    patch.setattr(GuardedTransport, "_per_peer", per_peer)
