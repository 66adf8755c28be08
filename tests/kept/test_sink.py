"""The sink in whole transfers: with a folder that cannot be used, errors of files, contents that change."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from embferry import GatherSink, wait
from embferry.kept import file as file_module
from embferry.kept import folder as folder_module
from embferry.kept.folder import KeptFolder
from embferry.kept.sink import KeptSink
from embferry.protocol.errors import Aborted
from embferry.protocol.settings import TransferSettings
from embferry.transfer.fields import Fields
from embferry.transports.in_memory.transport import InMemoryTransport
from tests.transfer.conftest import LAYOUT, SECONDS, Pair, embedding, same
from tests.transfer.faults.conftest import pair

from .workers import ROOMY, TOKENS, left_by_a_killed_one, names, taken, worker

__all__ = ["pair"]


def transferred(pair: Pair, sink: GatherSink, rows: Fields, room: int = 7) -> Fields:
    """Transfers an embedding. Returns copies of the arrays."""
    receiver = pair.receiver(room, sink)
    receiver.init()
    sender = pair.sender(room, rows)
    wait(receiver, SECONDS)
    found = {name: np.copy(array) for name, array in receiver.arrays().items()}
    receiver.clear()
    wait(sender, SECONDS)
    return found


def test_an_embedding_lies_in_a_file_while_it_arrives_and_no_longer(pair: Pair, place: Path) -> None:
    rows, sink = embedding(TOKENS), KeptSink(worker(place))
    receiver = pair.receiver(7, sink)
    receiver.init()
    sender = pair.sender(7, rows, ready=16)
    pair_changed = threading.Event()
    receiver.wake_on_change(pair_changed.set)
    while receiver.transferred_tokens < 16:
        assert pair_changed.wait(SECONDS)
        pair_changed.clear()
    assert len(names(place)) == 1
    sender.send_embedding(rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert len(names(place)) == 1
    receiver.clear()
    assert names(place) == []


def test_the_arrays_are_the_file_itself(pair: Pair, place: Path) -> None:
    """Nothing is copied once more."""
    by = worker(place)
    receiver = pair.receiver(7, KeptSink(by))
    receiver.init()
    pair.sender(7, embedding(TOKENS))
    wait(receiver, SECONDS)
    (file,) = by._files.values()
    assert all(array is file.arrays[name] for name, array in receiver.arrays().items())
    receiver.clear()


def test_a_transfer_begins_with_what_is_kept(pair: Pair, place: Path) -> None:
    left_by_a_killed_one(place, (0, 16), (32, 8))
    sink = KeptSink(worker(place), taken(place))
    receiver = pair.receiver(7, sink)
    assert receiver.kept_tokens == 0
    receiver.init()
    rows = embedding(TOKENS)
    sender = pair.sender(7, rows)
    wait(receiver, SECONDS)
    assert (receiver.kept_tokens, receiver.verified_tokens) == (24, 16)
    assert same(receiver.arrays(), rows)
    receiver.clear()
    wait(sender, SECONDS)
    assert sender.sent_bytes == 16 * LAYOUT.token_bytes


def test_kept_rows_cannot_be_used_before_it_is_known_that_they_are_right(pair: Pair, place: Path) -> None:
    left_by_a_killed_one(place, (0, 16))
    receiver = pair.receiver(7, KeptSink(worker(place), taken(place)))
    receiver.init()
    with pytest.raises(Exception, match="nothing has arrived yet"):
        receiver.arrays()
    other = embedding(TOKENS, seed=1)
    pair.sender(7, other, digest=b"another")
    wait(receiver, SECONDS)
    assert (receiver.kept_tokens, receiver.verified_tokens) == (0, TOKENS)
    assert same(receiver.arrays(), other)
    receiver.clear()
    assert names(place) == []


def test_another_length_starts_at_the_first_token(pair: Pair, place: Path) -> None:
    left_by_a_killed_one(place, (0, 16))
    rows = embedding(TOKENS + 5)
    assert same(transferred(pair, KeptSink(worker(place), taken(place)), rows), rows)
    assert names(place) == []


def test_without_checksums_nothing_is_recorded(place: Path) -> None:
    from embferry import ReceiveManager, SendManager
    from embferry.protocol.layout import Geometry

    settings = TransferSettings(verify=False)
    receiving = ReceiveManager(Geometry(LAYOUT, 8, 16), [InMemoryTransport()], settings=settings)
    pair = Pair(receiving, SendManager(LAYOUT, [InMemoryTransport()]), InMemoryTransport)
    rows, by = embedding(TOKENS), worker(place)
    receiver = pair.receiver(7, KeptSink(by))
    receiver.init()
    pair.sender(7, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    (file,) = by._files.values()
    assert not file.ranges
    receiver.clear()
    receiving.close()
    pair.sending.close()


def refuse(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "link", "open", "fstatvfs"])
def test_a_folder_that_fails_costs_no_request(
    call: str, pair: Pair, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    by = worker(place)
    monkeypatch.setattr(file_module.os, call, refuse)
    rows = embedding(TOKENS)
    try:
        for _ in range(2):
            receiver = pair.receiver(7 + _, KeptSink(by, by.take(b"digest", TOKENS)))
            receiver.init()
            sender = pair.sender(7 + _, rows)
            wait(receiver, SECONDS)
            assert same(receiver.arrays(), rows)
            receiver.clear()
            wait(sender, SECONDS)
    finally:
        monkeypatch.undo()
    assert by.unkept == 2
    assert sum("are not kept" in line.message for line in caplog.records) == 1, "one line a minute"
    assert names(place) == []


def test_a_record_that_cannot_be_written_costs_no_request(
    pair: Pair, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, rows = KeptSink(worker(place)), embedding(TOKENS)
    monkeypatch.setattr(file_module.KeptFile, "add", refuse)
    assert same(transferred(pair, sink, rows), rows)
    assert names(place) == []


def test_an_eighth_of_the_file_system_stays_free(pair: Pair, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by = worker(place)
    whole = os.statvfs(place.parent)
    free = [*whole[:3], whole.f_blocks // 8, whole.f_blocks // 8 + 1, *whole[5:]]
    monkeypatch.setattr(folder_module.os, "fstatvfs", lambda fd: os.statvfs_result(free))
    rows = embedding(TOKENS)
    assert same(transferred(pair, KeptSink(by), rows), rows)
    assert by.unkept == 1


def test_a_folder_that_is_gone_is_made_again(pair: Pair, place: Path) -> None:
    by, rows = worker(place), embedding(TOKENS)
    assert same(transferred(pair, KeptSink(by), rows), rows)
    os.rmdir(place)
    assert same(transferred(pair, KeptSink(by), rows, room=8), rows)
    assert by.unkept == 0


def test_a_failed_transfer_leaves_no_file(pair: Pair, place: Path) -> None:
    receiver = pair.receiver(7, KeptSink(worker(place)))
    receiver.init()
    sender = pair.sender(7, embedding(TOKENS), ready=16)
    changed = threading.Event()
    receiver.wake_on_change(changed.set)
    while receiver.transferred_tokens < 16:
        assert changed.wait(SECONDS)
        changed.clear()
    sender.abort(Aborted("asked for", room=7))
    with pytest.raises(Aborted):
        wait(receiver, SECONDS)
    receiver.clear()
    assert names(place) == []


def test_an_orderly_end_leaves_no_file(place: Path) -> None:
    by = worker(place)
    assert by.make(b"digest", TOKENS) is not None
    assert len(names(place)) == 1
    by.close()
    assert names(place) == []


def test_two_folders_of_one_bound_do_not_touch_each_other_s_files(place: Path) -> None:
    """Each counts the files of dead processes alone."""
    one, other = KeptFolder(place, 1, LAYOUT), KeptFolder(place, 1, LAYOUT)
    files = [each.make(f"{n}".encode(), TOKENS) for n in range(3) for each in (one, other)]
    assert None not in files
    assert len(names(place)) == 6
    assert ROOMY > 1
