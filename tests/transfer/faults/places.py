"""Places: every call of the driver that may raise, and what becomes of the transfer that is hit there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from embferry.transfer import control_messages, manager
from embferry.transfer.ready_queue import ReadyQueue
from embferry.transports.tcp.transport import TcpTransport

from .fault import Trip
from .place import End, Place, Plant, Strikes
from .scene import FIRST, Scene, Transfer, control_of, until
from .sink_places import SINK_PLACES


def _callback(end: str, register: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        return scene.begin(
            meet=lambda receiver, sender: getattr({"receiver": receiver, "sender": sender}[end], register)(trip)
        )

    return plant


# Machines and messages


def _machine(end: str, name: str) -> Plant:
    def plant(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
        return scene.begin(
            meet=lambda receiver, sender: trip.plant({"receiver": receiver, "sender": sender}[end].machine, name)
        )

    return plant


def _expire(end: str) -> Plant:
    """No timer of the scene expires in time, so every one counts as expired."""

    def plant(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
        patch.setattr(ReadyQueue, "is_due", lambda self, item, now: True)
        return _machine(end, "expire")(scene, trip, patch)

    return plant


def _encode(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    encoded = trip.before(control_messages.encode, lambda frame: frame.body.room == scene.room)
    patch.setattr(control_messages, "encode", encoded)
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


ENDS = ("receiving", "sending")

PLACES = (
    Place("receiver.on_change", _callback("receiver", "on_change")),
    Place("sender.on_change", _callback("sender", "on_change")),
    Place("receiver.wake_on_change", _callback("receiver", "wake_on_change"), End.ARRIVES),
    Place("sender.wake_on_change", _callback("sender", "wake_on_change"), End.ARRIVES),
    Place("the callback thread", _callback_thread),
    *SINK_PLACES,
    *(
        Place(f"receiver machine.{name}", _machine("receiver", name), is_machine=True)
        for name in ("receive", "take_commands", "grant", "verified_chunk", "consumed", "next_timeout")
    ),
    *(
        Place(f"sender machine.{name}", _machine("sender", name), is_machine=True)
        for name in ("receive", "take_commands", "write_done", "next_timeout")
    ),
    *(Place(f"{end} machine.expire", _expire(end), is_machine=True) for end in ("receiver", "sender")),
    Place("encode", _encode),
    Place("decode", _decode, End.ARRIVES),
    Place("admission.allocate", _part(lambda scene: scene.receiving.admission, "allocate"), End.ARRIVES),
    *(
        Place(f"receiving transport.{name}", _transport("receiving", name), end)
        for name, end in (
            ("connect_to_sender", End.ARRIVES),
            ("admit", End.ARRIVES),
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
    Place("receiving control plane.forget", _forget, End.ARRIVES, Strikes.AFTER_THE_END),
    *(
        Place(
            f"{end} control plane.close",
            _closing(lambda s, e=end: control_of(_manager(s, e))),
            End.CLOSE_RAISES,
            Strikes.AT_CLOSE,
        )
        for end in ENDS
    ),
    *(
        Place(f"{end} transport.close", _closing(lambda s, e=end: s.carriers[e]), End.CLOSE_RAISES, Strikes.AT_CLOSE)
        for end in ENDS
    ),
    Place("buffers.close", _closing(lambda scene: scene.receiving.buffers), End.CLOSE_RAISES, Strikes.AT_CLOSE),
)
