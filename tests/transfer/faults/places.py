"""Places: every call of the driver that may raise, and what becomes of the transfer that is hit there."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embferry import Checksums, ChunkSink, DeviceSink, GatherSink, Sink
from embferry.memory import buffers
from embferry.transfer import manager, sinks, writer
from embferry.transports.tcp.transport import TcpTransport

from ..conftest import LAYOUT
from .fault import Trip
from .scene import FIRST, SETTINGS, Device, Scene, Transfer, control_of, device_sink, until, zeros


class End(enum.Enum):
    """What becomes of the transfer that is hit. One that is only slow always arrives."""

    FAILS = enum.auto()
    ARRIVES = enum.auto()
    CLEAR_RAISES = enum.auto()
    """It arrives; the caller's ``clear()`` raises."""
    CLOSE_RAISES = enum.auto()
    """It arrives; the manager's ``close()`` raises."""


Plant = Callable[[Scene, Trip, pytest.MonkeyPatch], Transfer]


@dataclass(frozen=True)
class Place:
    """A place.

    Attributes:
        plant: Puts the fault there and begins the transfer that is hit.
        end: What becomes of that.
        late: Whether the fault strikes only after the transfer has arrived.
        is_told: Whether the peer hears of it at once: it does not if an end breaks before it has said a word.
        is_machine: Whether it is a state machine, which no task and no exit can interrupt.
    """

    name: str
    plant: Plant
    end: End = End.FAILS
    late: bool = False
    is_told: bool = True
    is_machine: bool = False


def _callback(end: str, register: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        return scene.begin(
            meet=lambda receiver, sender: getattr({"receiver": receiver, "sender": sender}[end], register)(trip)
        )

    return plant


# Sinks

SINKS: dict[str, Callable[[], Sink]] = {
    "gather": GatherSink,
    "gather in place": lambda: GatherSink(in_place=True),
    "gather into": lambda: GatherSink(make=zeros),
    "device": device_sink,
    "chunks": ChunkSink,
}


def _method(make: Callable[[], Sink], name: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        sink = make()
        trip.plant(sink, name)
        return scene.begin(sink)

    return plant


def _step(make: Callable[[], Sink]) -> Plant:
    """The fault strikes within a verification."""

    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        sink = make()
        verify = sink.verify

        def tripping(*arguments: Any) -> Any:
            trip()
            return (yield from verify(*arguments))

        sink.verify = tripping  # type: ignore[method-assign]
        return scene.begin(sink)

    return plant


def _is_complete(make: Callable[[], Sink]) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        sink = make()
        trip.plant_in_property(sink, "is_complete")
        return scene.begin(sink)

    return plant


def _restart(make: Callable[[], Sink]) -> Plant:
    """Another encode worker takes over and has another content."""

    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        sink = make()
        trip.plant(sink, "restart")
        first = scene.begin(sink)
        receiver = first.receiver
        until(receiver, lambda: receiver.transferred_tokens == FIRST)
        sender = scene.another_sender().open(scene.room)
        receiver.redirect(sender.manager.endpoint)  # type: ignore[attr-defined]
        second = Transfer(receiver, sender, {name: 255 - rows for name, rows in first.rows.items()})
        sender.init(len(first.rows["fill_ids"]), b"another digest")
        second.send(FIRST)
        return second

    return plant


def _drop(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    sink = GatherSink(in_place=True)
    trip.plant(sink, "drop")
    return scene.begin(sink)


def _make_arrays(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    return scene.begin(GatherSink(make=trip.before(zeros)))


def _make_targets(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    return scene.begin(
        DeviceSink(trip.before(lambda total: {name: Device(rows) for name, rows in zeros(total).items()}))
    )


def _copy_in(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    def make(total: int) -> dict[str, Device]:
        targets = {name: Device(rows) for name, rows in zeros(total).items()}
        trip.plant(targets["fill_ids"], "copy_in")
        return targets

    return scene.begin(DeviceSink(make))


def _landed(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    return scene.begin(DeviceSink(lambda total: {name: Device(rows) for name, rows in zeros(total).items()}, trip))


def _landing_thread(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    sink = device_sink()
    assert isinstance(sink, DeviceSink)
    trip.plant(sink._copier, "submit")
    return scene.begin(sink)


def _new_arrays(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    patch.setattr(sinks, "np", SimpleNamespace(empty=trip.before(np.empty), uint8=np.uint8))
    return scene.begin()


# Sources


def _on_device(rows: Any) -> dict[str, Device]:
    return {name: Device(array) for name, array in rows.items()}


def _copy_out(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    def source(rows: Any) -> dict[str, Device]:
        fields = _on_device(rows)
        trip.plant(fields["fill_ids"], "copy_out")
        return fields

    return scene.begin(source=source)


def _staging_buffer(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    trip.plant(scene.sending.writer, "_allocate")
    return scene.begin(source=_on_device)


def _staging_thread(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    trip.plant(scene.sending.writer._staging_buffers()._copier, "submit")
    return scene.begin(source=_on_device)


def _staging_close(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    staging = scene.sending.writer._staging_buffers()
    staging.close = trip.after(staging.close)  # type: ignore[method-assign]
    return scene.begin(source=_on_device)


def _pinned_checksums(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    ahead = Checksums(LAYOUT, SETTINGS.chunk_bytes)
    trip.plant(ahead, "of")
    return scene.begin(meet=lambda receiver, sender: setattr(sender._record, "checksums", ahead))


def _function(module: Any, name: str) -> Plant:
    def plant(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
        patch.setattr(module, name, trip.before(getattr(module, name)))
        return scene.begin()

    return plant


def _gathering(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    gathering = scene.receiving.buffers.gathering
    patch.setattr(scene.receiving.buffers, "gathering", trip.before(gathering))
    return scene.begin()


def _checksum_of_chunks(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    patch.setattr(sinks, "checksum", trip.before(buffers.checksum))
    return scene.begin(ChunkSink())


# Machines and messages


def _machine(end: str, name: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        return scene.begin(
            meet=lambda receiver, sender: trip.plant({"receiver": receiver, "sender": sender}[end].machine, name)
        )

    return plant


def _encode(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    patch.setattr(manager, "encode", trip.before(manager.encode, lambda frame: frame.body.room == scene.room))
    return scene.begin()


def _decode(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    patch.setattr(manager, "decode", trip.before(manager.decode))
    return scene.begin()


def _part(of: Callable[[Scene], Any], name: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        trip.plant(of(scene), name)
        return scene.begin()

    return plant


# Transports and control plane


def _transport(end: str, name: str) -> Plant:
    return _part(lambda scene: scene.carriers[end], name)


def _connect_anew(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    """An encode worker that has no connection to the receiver yet."""
    sending = scene.another_sender()
    trip.plant(sending.transports["tcp"]._transport, "connect")
    return scene.begin(sending=sending)


def _revoke(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    """Another encode worker takes over: the access of the first is revoked."""
    trip.plant(scene.carriers["receiving"], "revoke")
    first = scene.begin()
    receiver = first.receiver
    until(receiver, lambda: receiver.transferred_tokens == FIRST)
    sender = scene.another_sender().open(scene.room)
    receiver.redirect(sender.manager.endpoint)  # type: ignore[attr-defined]
    second = Transfer(receiver, sender, first.rows)
    sender.init(len(first.rows["fill_ids"]), b"digest")
    second.send(FIRST)
    return second


def _address(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    trip.plant_in_property(scene.carriers["sending"], "address")
    return scene.begin()


def _transport_thread(end: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        carrier = scene.carriers[end]
        assert isinstance(carrier, TcpTransport)
        carrier._loop.call(trip)
        return scene.begin()

    return plant


def _manager(scene: Scene, end: str) -> Any:
    return getattr(scene, end)


def _control(end: str, name: str) -> Plant:
    return _part(lambda scene: control_of(_manager(scene, end)), name)


def _connection(end: str) -> Plant:
    """A connection of the control plane fails while it receives."""

    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        control = control_of(_manager(scene, end))
        if end == "receiving":
            (connection,) = (peer.connection for peer in control._dialled.values())
        else:
            (connection,) = control._acceptor.listener.connections
        trip.plant(connection, "_receive")
        connection._shared.loop.call(lambda: None)
        return scene.begin()

    return plant


def _forget(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    trip.plant(control_of(scene.receiving), "forget")
    return scene.begin(sending=scene.another_sender())


def _closing(of: Callable[[Scene], Any]) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        owner = of(scene)
        owner.close = trip.after(owner.close)
        return scene.begin()

    return plant


def _callback_thread(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    trip.plant(scene.receiving._runtime, "run_callback")
    return scene.begin(meet=lambda receiver, sender: receiver.on_change(lambda: None))


def _waiter_blocks(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    return scene.begin(meet=lambda receiver, sender: receiver.wake_on_change(trip))


ENDS = ("receiving", "sending")

FIRST_CALLS = ("expire", "take_commands", "next_timeout")
"""Of a receiver's machine, before its first message has gone."""

PLACES = (
    Place("receiver.on_change", _callback("receiver", "on_change")),
    Place("sender.on_change", _callback("sender", "on_change")),
    Place("receiver.wake_on_change", _callback("receiver", "wake_on_change"), End.ARRIVES),
    Place("sender.wake_on_change", _callback("sender", "wake_on_change"), End.ARRIVES),
    Place("the callback thread", _callback_thread),
    *(
        Place(f"{kind}.{name}", _method(SINKS[kind], name))
        for kind in SINKS
        for name in ("granted", "verify", "deliver", "needs_preparation")
    ),
    *(Place(f"{kind}.prepare", _method(SINKS[kind], "prepare")) for kind in ("gather into", "device")),
    *(Place(f"{kind}.verify, within", _step(SINKS[kind])) for kind in SINKS),
    *(Place(f"{kind}.is_complete", _is_complete(SINKS[kind])) for kind in SINKS),
    *(Place(f"{kind}.restart", _restart(SINKS[kind])) for kind in SINKS),
    Place("gather in place.drop", _drop, End.CLEAR_RAISES, late=True),
    Place("make= of arrays", _make_arrays),
    Place("make= of targets", _make_targets),
    Place("copy_in", _copy_in),
    Place("landed=", _landed),
    Place("the landing thread", _landing_thread),
    Place("new arrays", _new_arrays),
    Place("copy_out", _copy_out),
    Place("allocate=", _staging_buffer),
    Place("the staging thread", _staging_thread),
    Place("checksums taken ahead", _pinned_checksums),
    Place("checksum while writing", _function(writer, "chunk_checksum")),
    Place("pieces of the source", _function(writer, "source_pieces")),
    Place("checksum while gathering", _gathering),
    Place("checksum of a chunk", _checksum_of_chunks),
    *(
        Place(f"receiver machine.{name}", _machine("receiver", name), is_machine=True, is_told=name not in FIRST_CALLS)
        for name in ("expire", "receive", "take_commands", "grant", "verified_chunk", "consumed", "next_timeout")
    ),
    *(
        Place(f"sender machine.{name}", _machine("sender", name), is_machine=True)
        for name in ("expire", "receive", "take_commands", "write_done", "next_timeout")
    ),
    Place("encode", _encode, is_told=False),
    Place("decode", _decode, End.ARRIVES),
    Place("admission.allocate", _part(lambda scene: scene.receiving.admission, "allocate"), End.ARRIVES),
    *(
        Place(f"receiving transport.{name}", _transport("receiving", name), end)
        for name, end in (
            ("connect_to_sender", End.FAILS),
            ("admit", End.FAILS),
            ("close_blocks", End.ARRIVES),
            ("poll", End.ARRIVES),
        )
    ),
    Place("receiving transport.revoke", _revoke, End.ARRIVES),
    *(Place(f"sending transport.{name}", _transport("sending", name), End.ARRIVES) for name in ("write", "poll")),
    Place("sending transport.connect", _connect_anew, End.ARRIVES),
    Place("sending transport.address", _address, End.ARRIVES),
    *(Place(f"{end} transport's thread", _transport_thread(end), End.ARRIVES) for end in ENDS),
    *(
        Place(f"{end} control plane.{name}", _control(end, name), End.ARRIVES)
        for end in ENDS
        for name in ("send", "poll", "flush")
    ),
    *(Place(f"{end} control connection", _connection(end), End.ARRIVES) for end in ENDS),
    Place("receiving control plane.forget", _forget, End.ARRIVES, late=True),
    *(
        Place(
            f"{end} control plane.close",
            _closing(lambda s, e=end: control_of(_manager(s, e))),
            End.CLOSE_RAISES,
            late=True,
        )
        for end in ENDS
    ),
    *(
        Place(f"{end} transport.close", _closing(lambda s, e=end: s.carriers[e]), End.CLOSE_RAISES, late=True)
        for end in ENDS
    ),
    Place("buffers.close", _closing(lambda scene: scene.receiving.buffers), End.CLOSE_RAISES, late=True),
    Place("staging.close", _staging_close, End.CLOSE_RAISES, late=True),
)
