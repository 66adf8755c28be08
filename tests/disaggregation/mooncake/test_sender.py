"""Our sender with a receiver of the origin, frame by frame, over real sockets."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import (
    EncodeManager,
    MooncakeEmbeddingBootstrapServer,
    OriginSettings,
)
from embferry.discovery.bootstrap_client import BootstrapClient, Shape
from embferry.protocol.errors import Aborted, LeaseExpired, LocalProtocolError, PeerGone, TransportError
from embferry.protocol.states import KVPoll
from tests.ports import free_port

from .builders import (
    GEOMETRY,
    ROOM,
    WAIT_S,
    PeerDouble,
    StoppedClock,
    encode_manager,
    equal,
    eventually,
    last_refusal,
    refusals,
)
from .engine_double import EngineNetwork
from .origin_peers import BLOCK, OriginReceiver, embedding

pytestmark = pytest.mark.integration


@pytest.fixture
def manager(network: EngineNetwork) -> Iterator[EncodeManager]:
    with encode_manager(network) as manager:
        yield manager


@pytest.fixture
def receiver(network: EngineNetwork, manager: EncodeManager) -> Iterator[OriginReceiver]:
    receiver = OriginReceiver(PeerDouble(network), "127.0.0.1", manager.port)
    yield receiver
    receiver.close()


def sending(manager: EncodeManager, tokens: int, room: int = ROOM, seed: int = 1) -> tuple[Any, Any]:
    sender, rows = manager.open(room), embedding(tokens, seed)
    sender.init(tokens, b"digest", (0, -7))
    sender.send_embedding(rows)
    return sender, rows


def report(room: int, status: KVPoll) -> list[bytes]:
    return [str(room).encode(), str(int(status)).encode()]


def test_a_single_transfer(manager, receiver):
    sender, rows = sending(manager, 21)
    receiver.register()
    receiver.init(ROOM, [4, 5, 1])
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([4, 5, 1], 21), rows)
    assert list(receiver.buffers.aux[4, :3]) == [21, -7, 0]
    assert not receiver.buffers.aux[[5, 1]].any()
    assert not receiver.buffers.rows["input_embeddings"][1, 5 * 128 :].any(), (
        "only the leading part of a row is written"
    )
    sender.wait(WAIT_S)
    assert sender.poll() is KVPoll.Success
    assert sender.source_released


def test_a_long_embedding_is_sent_in_several_resumed_transfers(manager, receiver):
    _, rows = sending(manager, 45)
    receiver.register()
    receiver.init(ROOM, [7, 0])
    parts = []
    for sent, blocks in ((0, [7, 0]), (16, [3]), (24, [0, 7])):
        if sent:
            receiver.buffers.aux[:] = 99
            receiver.resume(ROOM, blocks, sent)
        assert receiver.status() == report(ROOM, KVPoll.Transferring)
        parts.append(receiver.take(blocks, len(blocks) * BLOCK))
        assert sent == 0 or (receiver.buffers.aux == 99).all(), "aux_datas is written once"
    receiver.resume(ROOM, [2, 1], 40)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    parts.append(receiver.take([2, 1], 5))
    for name, array in rows.items():
        assert b"".join(part[name].tobytes() for part in parts) == array.tobytes()


def test_every_change_wakes_its_waiters(manager, receiver):
    """Callers that wait for a change must not have to poll."""
    sender = manager.open(ROOM)
    seen: list[KVPoll] = []
    sender.wake_on_change(lambda: seen.append(sender.poll()))
    sender.init()
    receiver.register()
    receiver.init(ROOM, [0])
    eventually(lambda: seen == [KVPoll.WaitingForInput])
    sender.send_embedding(embedding(12))
    assert receiver.status() == report(ROOM, KVPoll.Transferring)
    receiver.resume(ROOM, [1], 8)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    eventually(lambda: seen[-1] is KVPoll.Success)


def test_the_receiver_may_ask_before_the_room_is_open(manager, receiver):
    receiver.register()
    receiver.init(ROOM, [0])
    _, rows = sending(manager, 8)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([0], 8), rows)


def test_a_room_begins_and_resumes_when_all_ranks_have_asked(network, manager, receiver):
    other = OriginReceiver(PeerDouble(network), "127.0.0.1", manager.port)
    sender, rows = sending(manager, 20)
    receiver.register()
    other.register()
    receiver.init(ROOM, [0, 1], ranks=2)
    eventually(lambda: len(manager.rooms._rooms[ROOM].asked) == 1)
    assert sender.poll() is KVPoll.Bootstrapping
    other.init(ROOM, [5, 6], ranks=2)
    for rank in (receiver, other):
        assert rank.status() == report(ROOM, KVPoll.Transferring)
    receiver.resume(ROOM, [2], 16, ranks=2)
    other.resume(ROOM, [9], 16, ranks=2)
    for rank, blocks in ((receiver, [0, 1, 2]), (other, [5, 6, 9])):
        assert rank.status() == report(ROOM, KVPoll.Success)
        assert equal(rank.take(blocks, 20), rows)
    other.close()


def test_the_receiver_of_a_refused_init_is_told_why_not_and_may_ask_again(manager, receiver, caplog):
    _, rows = sending(manager, 8)
    receiver.init(ROOM, [0])  # before it has registered
    assert receiver.status() == report(ROOM, KVPoll.Failed)
    assert "not registered" in last_refusal(caplog)
    receiver.register()
    receiver.say(*receiver.head(ROOM), b"0", b"1", b"16")  # of a receiver with another block size
    assert receiver.status() == report(ROOM, KVPoll.Failed)
    assert "the same block size on both sides" in last_refusal(caplog)
    receiver.init(ROOM, [0])
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([0], 8), rows)


@pytest.mark.parametrize("ending", ["success", "failure"])
def test_a_room_number_may_be_used_again_and_the_receiver_may_ask_first(manager, receiver, ending):
    first, _ = sending(manager, 8)
    receiver.register()
    if ending == "failure":
        first.abort()
    else:
        receiver.init(ROOM, [0])
        assert receiver.status() == report(ROOM, KVPoll.Success)
    receiver.init(ROOM, [3, 4])
    eventually(lambda: ROOM in manager.rooms._rooms)
    assert not receiver.pull.poll(0)
    _, rows = sending(manager, 12, seed=2)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([3, 4], 12), rows)


MALFORMED = {
    "one frame": [b"7"],
    "six frames": [b"7", b"h", b"1", b"h:1", b"0", b"1"],
    "40 frames": [b"7"] * 40,
    "a register of six": [b"None", b"127.0.0.1", b"1", b"h:1", b"x" * 40, b""],
    "no number": [b"x", b"127.0.0.1", b"1", b"h:1", b"0", b"1", b"8"],
    "not UTF-8": [b"\xff\xfe", b"\xff", b"\xff", b"\xff", b"\xff", b"\xff", b"\xff"],
    "negative": [b"7", b"127.0.0.1", b"1", b"h:1", b"-1", b"1", b"8"],
    "huge": [b"9" * 400, b"127.0.0.1", b"1", b"h:1", b"0", b"1", b"8"],
    "a huge block": [b"7", b"127.0.0.1", b"1", b"h:1", b"9" * 30, b"1", b"8"],
    "a block that does not exist": [b"7", b"127.0.0.1", b"1", b"h:1", b"12", b"1", b"8"],
    "a block twice": [b"7", b"127.0.0.1", b"1", b"h:1", b"1,1", b"1", b"16"],
    "no ranks": [b"7", b"127.0.0.1", b"1", b"h:1", b"1", b"0", b"8"],
    "a port of 0": [b"7", b"127.0.0.1", b"0", b"h:1", b"1", b"1", b"8"],
    "another block size": [b"7", b"127.0.0.1", b"1", b"h:1", b"1", b"1", b"16"],
    "not aligned": [b"7", b"127.0.0.1", b"1", b"h:1", b"1", b"1", b"7", b"8"],
    "torn pointers": [b"None", b"127.0.0.1", b"1", b"h:1", b"x" * 39],
    "a null pointer": [b"None", b"127.0.0.1", b"1", b"h:1", struct.pack("5Q", 1, 2, 3, 0, 5)],
    "no address": [b"None", b"127.0.0.1", b"1", b"h:1", struct.pack("5Q", 1, 2, 3, 1 << 63, 5)],
    "too few buffers": [b"None", b"127.0.0.1", b"1", b"h:1", struct.pack("4Q", 1, 2, 3, 4)],
    "a long frame": [b"7", b"127.0.0.1", b"1", b"h:1", b"1," * (600 << 10), b"1", b"8"],
    "a session that has not registered": [b"7", b"127.0.0.1", b"1", b"127.0.0.1:9", b"1", b"1", b"8"],
    "an unknown room": [b"7", b"127.0.0.1", b"1", b"127.0.0.1:9", b"1", b"1", b"8", b"8"],
}


def test_malformed_messages_are_refused_with_a_reason_and_the_room_completes(manager, receiver, caplog):
    _, rows = sending(manager, 20)
    receiver.register()
    receiver.init(ROOM, [0, 1])
    assert receiver.status() == report(ROOM, KVPoll.Transferring)
    for name, frames in MALFORMED.items():
        before = len(refusals(caplog))
        receiver.say(*frames)
        eventually(lambda before=before: len(refusals(caplog)) == before + 1)
        assert refusals(caplog)[-1].partition("): ")[2], name
    receiver.register()  # again, with the same buffers
    receiver.init(ROOM, [3, 4])  # again
    receiver.resume(ROOM, [2], 8)  # not what has been sent
    receiver.resume(ROOM, [2], 24)
    receiver.resume(ROOM, [2], 16, ranks=2)
    expected = len(MALFORMED) + 5
    eventually(lambda: len(refusals(caplog)) == expected)
    assert not receiver.pull.poll(0), "nothing else happened"
    receiver.resume(ROOM, [2], 16)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([0, 1, 2], 20), rows)
    assert not receiver.buffers.rows["fill_ids"][3:].any()
    receiver.resume(ROOM, [2], 16)  # late
    eventually(lambda: "the room is unknown, or over" in last_refusal(caplog))
    assert len(refusals(caplog)) == expected + 1


def test_a_message_with_a_huge_frame_is_dropped_unread(manager, receiver):
    _, rows = sending(manager, 8)
    stranger = OriginReceiver(receiver.engine.__class__(receiver.engine.engine.network), "127.0.0.1", manager.port)
    stranger.say(b"7", b"x" * (8 << 20))
    receiver.register()
    receiver.init(ROOM, [0])
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([0], 8), rows)
    stranger.close()


def test_a_failed_write_fails_its_room_and_the_session_stays_usable(network, manager, receiver):
    first, _ = sending(manager, 8, room=1)
    receiver.register()
    network.fail_next = 1
    receiver.init(1, [0])
    assert receiver.status() == report(1, KVPoll.Failed)
    with pytest.raises(TransportError):
        first.wait(WAIT_S)
    assert first.source_released
    _, rows = sending(manager, 8, room=2)
    receiver.init(2, [3])
    assert receiver.status() == report(2, KVPoll.Success)
    assert equal(receiver.take([3], 8), rows)


def test_a_session_may_register_other_buffers_when_no_room_uses_the_earlier_ones(manager, receiver, caplog):
    _, rows = sending(manager, 12)
    receiver.register()
    receiver.init(ROOM, [0])
    assert receiver.status() == report(ROOM, KVPoll.Transferring)
    receiver.say(*receiver.head("None"), struct.pack("5Q", 8, 8, 8, 8, 8))
    eventually(lambda: any("other buffers" in reason for reason in refusals(caplog)))
    receiver.resume(ROOM, [1], 8)
    assert receiver.status() == report(ROOM, KVPoll.Success)
    assert equal(receiver.take([0, 1], 12), rows)


def test_pointers_to_memory_that_does_not_exist_fail_the_write_and_not_the_thread(manager, receiver):
    sending(manager, 8, room=1)
    receiver.say(*receiver.head("None"), struct.pack("5Q", *[(1 << 62) - 1] * 5))
    receiver.init(1, [11])
    assert receiver.status() == report(1, KVPoll.Failed)
    receiver.register()
    _, rows = sending(manager, 8, room=2)
    receiver.init(2, [0])
    assert receiver.status() == report(2, KVPoll.Success)
    assert equal(receiver.take([0], 8), rows)


def test_no_status_is_sent_while_a_write_is_in_flight(network, manager, receiver):
    network.writes_finish.clear()
    sender, rows = sending(manager, 8)
    receiver.register()
    receiver.init(ROOM, [0])
    eventually(lambda: sender.poll() is KVPoll.Transferring)
    sender.abort()
    assert not receiver.pull.poll(50)
    assert not sender.source_released
    network.writes_finish.set()
    assert receiver.status() == report(ROOM, KVPoll.Failed)
    with pytest.raises(Aborted):
        sender.wait(WAIT_S)
    assert equal(receiver.take([0], 8), rows), "the write in flight ended before the receiver was told"


def test_every_state_has_a_time_out(manager, receiver):
    clock = StoppedClock(manager)
    receiver.register()
    not_asked_for, _ = sending(manager, 8, room=1)
    clock.pass_time(31)
    with pytest.raises(LeaseExpired, match="asked in time"):
        not_asked_for.wait(WAIT_S)
    receiver.init(2, [0])
    eventually(lambda: 2 in manager.rooms._rooms)
    clock.pass_time(31)
    assert receiver.status() == report(2, KVPoll.Failed)
    not_made = manager.open(3)
    not_made.init()
    receiver.init(3, [0])
    eventually(lambda: not_made.poll() is KVPoll.WaitingForInput)
    clock.pass_time(121)
    assert receiver.status() == report(3, KVPoll.Failed)
    with pytest.raises(LeaseExpired, match="not made in time"):
        not_made.wait(WAIT_S)
    half, _ = sending(manager, 16, room=4)
    receiver.init(4, [0])
    assert receiver.status() == report(4, KVPoll.Transferring)
    clock.pass_time(31)
    assert receiver.status() == report(4, KVPoll.Failed)
    with pytest.raises(LeaseExpired, match="asked for the rest"):
        half.wait(WAIT_S)


def test_close_reports_failure_to_receivers_and_ends_the_engines(network):
    manager = encode_manager(network)
    receiver = OriginReceiver(PeerDouble(network), "127.0.0.1", manager.port)
    network.writes_finish.clear()
    sender, _ = sending(manager, 8)
    receiver.register()
    receiver.init(ROOM, [0])
    eventually(lambda: sender.poll() is KVPoll.Transferring)
    manager.close()
    assert receiver.status() == report(ROOM, KVPoll.Failed)
    assert sender.poll() is KVPoll.Failed
    assert isinstance(sender.failure_exception(), Aborted)
    assert list(network.engines) == [receiver.engine.session_id], "only the receiver's engine is left"
    with pytest.raises(LocalProtocolError, match="closed"):
        manager.open(5).init()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("embferry-origin")]
    receiver.close()


def test_the_rank_registers_again_when_the_bootstrap_server_is_restarted(network):
    def known() -> bool:
        try:
            return client.route(0).rank_port == manager.port
        except PeerGone:
            return False

    with MooncakeEmbeddingBootstrapServer(port=free_port()) as first:
        client = BootstrapClient(first.url)
        settings = OriginSettings(heartbeat_interval=0.05)
        manager = EncodeManager(GEOMETRY, bootstrap_url=first.url, settings=settings, open_engine=network.open)
        eventually(known)
        assert client.shape() == Shape(1, 1)
    with manager, MooncakeEmbeddingBootstrapServer(port=first.port):
        eventually(known)


def test_wrong_calls_raise_an_error_that_names_the_mistake(manager):
    sender = manager.open(ROOM)
    rows = embedding(8)
    with pytest.raises(LocalProtocolError, match="not waiting"):
        sender.send_embedding(rows)
    early = manager.open(1)
    early.abort()
    assert early.poll() is KVPoll.Failed
    with pytest.raises(LocalProtocolError, match="int32"):
        sender.init(8, aux=tuple(range(17)))
    sender.init(8)
    with pytest.raises(LocalProtocolError, match="called once"):
        sender.init(8)
    with pytest.raises(LocalProtocolError, match="open already"):
        manager.open(ROOM).init()
    with pytest.raises(LocalProtocolError, match="announced were 8"):
        sender.send_embedding(embedding(9))
    with pytest.raises(LocalProtocolError, match="mrope_positions is missing"):
        sender.send_embedding({name: rows[name] for name in rows if name != "mrope_positions"})
    sender.send_embedding(rows, ready_tokens=4)
    assert sender.poll() is KVPoll.Bootstrapping
    sender.send_embedding(rows)
    with pytest.raises(LocalProtocolError, match="has not failed"):
        sender.failure_exception()
    with pytest.raises(LocalProtocolError, match="not waiting"):
        sender.send_embedding(rows)
