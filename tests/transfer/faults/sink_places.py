"""Places: sinks, and sources of embeddings."""

from __future__ import annotations

import os
import secrets
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embferry import Checksums, ChunkSink, DeviceSink, GatherSink, Sink
from embferry.kept.folder import KeptFolder
from embferry.kept.sink import KeptSink
from embferry.memory import buffers
from embferry.transfer import checksums, sinks, writer

from ..conftest import LAYOUT
from .fault import Trip
from .place import End, Place, Plant, Strikes
from .scene import FIRST, SETTINGS, Device, Scene, Transfer, device_sink, until, zeros


def kept_sink() -> Sink:
    """Returns a sink with a folder of its own, which goes with it."""
    place = Path("/dev/shm", f"embferry-test-{os.getpid()}-{secrets.token_hex(4)}")
    sink = KeptSink(KeptFolder(place, 1 << 30, LAYOUT))
    weakref.finalize(sink, shutil.rmtree, place, ignore_errors=True)
    return sink


SINKS: dict[str, Callable[[], Sink]] = {
    "gather": GatherSink,
    "gather in place": lambda: GatherSink(in_place=True),
    "gather into": lambda: GatherSink(make=zeros),
    "device": device_sink,
    "kept": kept_sink,
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
        sink.verify = _tripping(trip, sink.verify)  # type: ignore[method-assign]
        return scene.begin(sink)

    return plant


def _tripping(trip: Trip, steps: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a generator function whose first step is the fault."""

    def tripping(*arguments: Any) -> Any:
        trip()
        return (yield from steps(*arguments))

    return tripping


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


def _copied(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
    return scene.begin(DeviceSink(lambda total: {name: Device(rows) for name, rows in zeros(total).items()}, trip))


def _device_sink_thread(scene: Scene, trip: Trip, _: pytest.MonkeyPatch) -> Transfer:
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


def _checksum_in_steps(scene: Scene, trip: Trip, patch: pytest.MonkeyPatch) -> Transfer:
    patch.setattr(writer, "AT_ONCE_BYTES", 0)
    patch.setattr(writer, "checksum_steps", _tripping(trip, checksums.checksum_steps))
    return scene.begin()


SINK_PLACES = (
    *(
        Place(f"{kind}.{name}", _method(SINKS[kind], name))
        for kind in SINKS
        for name in ("granted", "verify", "deliver", "needs_preparation")
    ),
    *(Place(f"{kind}.prepare", _method(SINKS[kind], "prepare")) for kind in ("gather into", "device", "kept")),
    *(Place(f"{kind}.verify, within", _step(SINKS[kind])) for kind in SINKS),
    *(Place(f"{kind}.is_complete", _is_complete(SINKS[kind])) for kind in SINKS),
    *(Place(f"{kind}.restart", _restart(SINKS[kind])) for kind in SINKS),
    Place("gather in place.drop", _drop, End.CLEAR_RAISES, Strikes.AFTER_THE_END),
    Place("make= of arrays", _make_arrays),
    Place("make= of targets", _make_targets),
    Place("copy_in", _copy_in),
    Place("copied=", _copied),
    Place("the copying thread of a device sink", _device_sink_thread),
    Place("new arrays", _new_arrays),
    Place("copy_out", _copy_out),
    Place("allocate=", _staging_buffer),
    Place("the staging thread", _staging_thread),
    Place("checksums taken ahead", _pinned_checksums),
    Place("checksum while writing", _function(writer, "chunk_checksum")),
    Place("checksum beside the writing", _checksum_in_steps),
    Place("pieces of the source", _function(writer, "source_pieces")),
    Place("checksum while gathering", _gathering),
    Place("checksum of a chunk", _checksum_of_chunks),
    Place("staging.close", _staging_close, End.CLOSE_RAISES, Strikes.AT_CLOSE),
)
