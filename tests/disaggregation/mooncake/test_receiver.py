"""Our receiver with a sender of the origin, frame by frame, over real sockets."""

from __future__ import annotations

import struct
import threading

import numpy as np
import pytest

from embferry.disaggregation.mooncake import language_manager as language_manager_module
from embferry.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingBootstrapServer
from embferry.protocol.errors import (
    Aborted,
    CapacityError,
    LeaseExpired,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
)
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll
from tests.ports import free_port

from .builders import (
    ROOM,
    WAIT_S,
    StoppedClock,
    equal,
    eventually,
    language_manager,
    last_refusal,
    refusals,
    register_rank,
    started,
)
from .origin_peers import BLOCK, BLOCKS, SUCCESS, TRANSFERRING, embedding

pytestmark = pytest.mark.integration


def test_the_registration_and_the_first_request_are_the_origins_frame_by_frame(manager, sender, address):
    receiver = manager.open(ROOM, address)
    allocation = manager.allocate(2 * BLOCK, ROOM)
    receiver.init(allocation)
    register, init = sender.pull.recv_multipart(), sender.pull.recv_multipart()
    session = manager.pool.current.session_id.encode()
    head = [b"127.0.0.1", str(manager.port).encode(), session]
    assert register[:4] == [b"None", *head]
    assert struct.unpack("5Q", register[4]) == manager.pool.current.pointers
    blocks = ",".join(map(str, allocation.blocks)).encode()
    assert init == [str(ROOM).encode(), *head, blocks, b"1", b"16"]
    assert receiver.poll() is KVPoll.WaitingForInput
    again = manager.open(ROOM + 1, address)
    again.init()
    assert sender.pull.recv_multipart()[0] == str(ROOM + 1).encode(), "a session registers once"


@pytest.mark.parametrize("rank", [None, 0, -1])
def test_a_single_transfer_with_statuses_of_two_or_three_frames(manager, sender, address, rank):
    rows = embedding(21)
    sender.encode(rows)
    receiver = started(manager, address)
    assert sender.answer(sender.hear(), rank=rank) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)
    assert list(receiver.aux[:2]) == [21, -7]
    assert (receiver.total_embedding_length, receiver.transferred_tokens, receiver.transfers) == (21, 21, 1)
    assert manager.allocator.available == BLOCKS


def test_a_long_embedding_arrives_in_several_resumed_transfers(manager, sender, address, caplog):
    rows = embedding(90)
    sender.encode(rows)
    caplog.set_level("INFO")
    hog = manager.allocate((BLOCKS - 4) * BLOCK, 99)
    receiver = started(manager, address)
    expected, requests = 0, 0
    while True:
        frames = sender.hear()
        assert sender.sent(frames) == expected
        assert len(frames) == (8 if expected else 7)
        expected += sender.allocated(frames)
        requests += 1
        if sender.answer(frames) == SUCCESS:
            break
    receiver.wait(WAIT_S)
    assert requests == receiver.transfers == 4
    assert equal(receiver.arrays(), rows)
    manager.allocator.free(hog.blocks, 99)
    manager.allocator.check_integrity()
    assert manager.allocator.available == BLOCKS
    for phrase in (
        "needs resume for remaining data",
        "Sent resume transfer request",
        "completed with resumed transfer",
    ):
        assert phrase in caplog.text


def test_the_caller_may_allocate_the_blocks_of_every_transfer(manager, sender, address):
    rows = embedding(30)
    sender.encode(rows)
    receiver = manager.open(ROOM, address)
    receiver.init(manager.allocate(BLOCK, ROOM))
    with pytest.raises(LocalProtocolError, match="needs_resume"):
        receiver.resume_transfer(manager.allocate(BLOCK, ROOM))
    assert sender.answer(sender.hear()) == TRANSFERRING
    eventually(lambda: receiver.needs_resume)
    assert equal(receiver.buffered_chunks(), {name: array[:BLOCK] for name, array in rows.items()})
    with pytest.raises(LocalProtocolError, match="resume at token 8"):
        receiver.resume_transfer(manager.allocate(BLOCK, ROOM), 16)
    with pytest.raises(LocalProtocolError, match="not held by this room"):
        receiver.resume_transfer(manager.allocate(BLOCK, 5), 8)
    assert receiver.resume_transfer(manager.allocate(5 * BLOCK, ROOM), 8) == 22
    frames = sender.hear()
    assert sender.allocated(frames) == 3 * BLOCK, "two spare blocks went back at once"
    assert sender.answer(frames) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)


MALFORMED = {
    "one frame": [b"7"],
    "four frames": [str(ROOM).encode(), b"4", b"0", b"0"],
    "a header": [b"AUX_DATA", b"7", b"0"],
    "no number": [b"x", b"4"],
    "not UTF-8": [b"\xff", b"\xfe"],
    "negative": [str(ROOM).encode(), b"-4"],
    "no status": [str(ROOM).encode(), b"5"],
    "huge": [b"9" * 1000, b"4"],
    "a bad rank": [str(ROOM).encode(), b"4", b"x"],
    "an unknown room": [b"7", b"4"],
}


def test_malformed_statuses_are_refused_with_a_reason_and_the_room_completes(manager, sender, address, caplog):
    rows = embedding(30)
    sender.encode(rows)
    receiver = started(manager, address)
    frames = sender.hear()
    for name, bad in MALFORMED.items():
        before = len(refusals(caplog))
        sender.push("127.0.0.1", manager.port, bad)
        eventually(lambda before=before: len(refusals(caplog)) == before + 1)
        assert refusals(caplog)[-1].partition("): ")[2], name
    assert receiver.poll() is KVPoll.WaitingForInput
    assert sender.answer(frames) == TRANSFERRING
    assert sender.answer(sender.hear()) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)
    sender.report(frames, SUCCESS)
    eventually(lambda: "unknown, or over" in last_refusal(caplog))


def test_a_repeated_transferring_is_refused_because_no_token_is_new(manager, sender, address, caplog):
    rows = embedding(70)
    sender.encode(rows)
    receiver = started(manager, address)
    first = sender.hear()
    sender.report(first, TRANSFERRING)  # before anything was written
    eventually(lambda: "aux_datas" in last_refusal(caplog))
    sender.answer(first)
    second = sender.hear()
    sender.report(first, TRANSFERRING)  # repeated
    sender.report(first, SUCCESS)
    eventually(lambda: len(refusals(caplog)) == 3)
    assert "repeated" in refusals(caplog)[-1]
    assert receiver.transferred_tokens == 24
    sender.answer(second)
    while receiver.poll() is not KVPoll.Success:
        if sender.pull.poll(50):
            sender.answer(sender.hear())
    assert equal(receiver.arrays(), rows)


@pytest.mark.parametrize("status", [TRANSFERRING, SUCCESS])
def test_a_sender_with_another_block_size_delivers_nothing_that_is_wrong(network, sender, address, caplog, status):
    """Its rows are half as long, so they end up at other addresses than ours."""
    with language_manager(network) as manager:
        clock = StoppedClock(manager)
        sender.encode(embedding(2 * BLOCK))
        receiver = manager.open(ROOM, address)
        receiver.init(manager.allocate(2 * BLOCK, ROOM))
        frames = sender.hear()
        pointers, row = sender.pointers[frames[3].decode()], sender.buffers.all[0][0].nbytes // 2
        for block in map(int, frames[4].split(b",")):
            source = sender.buffers.all[0].ctypes.data
            assert sender.engine.write(frames[3].decode(), source, pointers[0] + block * row, row)
        source = sender.buffers.aux.ctypes.data
        assert sender.engine.write(frames[3].decode(), source, pointers[3] + 64 * int(frames[4].split(b",")[0]), 64)
        sender.report(frames, status)
        eventually(lambda: "do not hold" in last_refusal(caplog))
        assert receiver.transferred_tokens == 0
        clock.pass_time(121)
        with pytest.raises(LeaseExpired):
            receiver.wait(WAIT_S)


def test_success_before_the_last_token_and_impossible_lengths_fail_the_room(manager, sender, address):
    sender.encode(embedding(70))
    receiver = started(manager, address)
    frames = sender.hear()
    sender.write(frames)
    sender.report(frames, SUCCESS)
    with pytest.raises(RemoteProtocolError, match="46 of 70 tokens"):
        receiver.wait(WAIT_S)
    sender.buffers.aux[0, 0] = 1 << 30
    receiver = started(manager, address, 5)
    frames = sender.hear()
    sender.write(frames)
    sender.report(frames, TRANSFERRING)
    with pytest.raises(RemoteProtocolError, match="1073741824 tokens"):
        receiver.wait(WAIT_S)


def test_a_failure_that_the_sender_reports_fails_its_room_only(manager, sender, address):
    rows = embedding(20)
    sender.encode(rows)
    lost = started(manager, address, 1)
    sender.report(sender.hear(), 0)
    with pytest.raises(PeerGone):
        lost.wait(WAIT_S)
    receiver = started(manager, address, 2)
    assert sender.answer(sender.hear()) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)


def test_every_state_has_a_time_out(network, sender, address):
    with language_manager(network, transfer=TransferSettings(default_allocate_tokens=BLOCK)) as manager:
        clock = StoppedClock(manager)
        sender.encode(embedding(20))
        not_found = started(manager, "127.0.0.1:9", 1)
        clock.pass_time(31)
        with pytest.raises(PeerGone):
            not_found.wait(WAIT_S)
        unanswered = started(manager, address, 2)
        sender.hear()
        clock.pass_time(121)
        with pytest.raises(LeaseExpired, match="sent nothing"):
            unanswered.wait(WAIT_S)
        half = started(manager, address, 3)
        sender.answer(sender.hear())
        sender.hear()
        clock.pass_time(31)
        with pytest.raises(LeaseExpired, match="about the rest"):
            half.wait(WAIT_S)
        eventually(lambda: manager.allocator.available == BLOCKS)


def test_two_misses_fail_the_rooms_of_an_encode_side_and_its_successor_is_registered_with(network, sender):
    with language_manager(network, heartbeat_interval=0.05) as manager:
        server = MooncakeEmbeddingBootstrapServer(port=free_port())
        server.start()
        address = register_rank(server, sender.port)
        lost = started(manager, address, 1)
        sender.hear()
        server.stop()
        with pytest.raises(PeerGone):
            lost.wait(WAIT_S)
        with MooncakeEmbeddingBootstrapServer(port=server.port) as again:
            register_rank(again, sender.port)
            rows = embedding(8)
            sender.encode(rows)
            sender.pointers.clear()
            receiver = started(manager, address, 2)
            sender.answer(sender.hear())
            receiver.wait(WAIT_S)
            assert equal(receiver.arrays(), rows)


def test_close_fails_open_rooms_and_leaves_no_thread_and_no_engine(network, sender, address):
    manager = language_manager(network)
    receiver = started(manager, address)
    sender.hear()
    manager.close()
    assert receiver.poll() is KVPoll.Failed
    assert isinstance(receiver.failure_exception(), Aborted)
    assert list(network.engines) == [sender.engine.session_id]
    with pytest.raises(LocalProtocolError, match="closed"):
        started(manager, address, 2)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("embferry-origin")]


def test_a_room_in_use_is_refused_and_an_empty_embedding_arrives(manager, sender, address):
    sender.encode(embedding(0))
    receiver = started(manager, address)
    with pytest.raises(LocalProtocolError, match="in use"):
        started(manager, address)
    frames = sender.hear()
    assert sender.engine.write(
        frames[3].decode(),
        sender.buffers.aux.ctypes.data,
        sender.pointers[frames[3].decode()][3] + 64 * int(frames[4].split(b",")[0]),
        64,
    )
    sender.report(frames, SUCCESS)
    receiver.wait(WAIT_S)
    assert receiver.total_embedding_length == 0
    assert all(np.size(array) == 0 for array in receiver.arrays().values())


def test_encode_sides_without_rooms_make_room_for_others(network, sender, address, monkeypatch):
    """Callers may name any bootstrap server, and each has a thread."""
    monkeypatch.setattr(language_manager_module, "MAX_SIDES", 2)
    sender.encode(embedding(8))
    with language_manager(network) as manager:
        waiting = started(manager, "127.0.0.1:9", 1)
        for room in (2, 3):
            receiver = started(manager, address, room)
            sender.answer(sender.hear())
            receiver.wait(WAIT_S)
        assert len(manager._sides) == 2
        other = started(manager, "127.0.0.1:10", 4)  # the side at ``address`` has no rooms
        assert len(manager._sides) == 2
        with pytest.raises(CapacityError, match="2 bootstrap servers"):
            started(manager, address, 5)
        waiting.abort()
        receiver = started(manager, address, 6)
        sender.answer(sender.hear())
        receiver.wait(WAIT_S)
        other.abort()
