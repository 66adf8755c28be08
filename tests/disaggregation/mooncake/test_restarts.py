"""Restarts of either side, with or without the same ports."""

from __future__ import annotations

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import EncodeManager
from embferry.protocol.errors import PeerGone
from embferry.protocol.states import KVPoll
from tests.ports import free_port

from .builders import GEOMETRY, WAIT_S, PeerDouble, encode_manager, equal, eventually, register_rank, started
from .origin_peers import BLOCK, FAILED, SUCCESS, TRANSFERRING, OriginReceiver, OriginSender, embedding

pytestmark = pytest.mark.integration


def test_an_encode_side_that_is_back_before_it_was_missed_is_registered_with_after_one_failure(
    manager, sender, address
):
    """The sender has the port of its predecessor, and nothing of what that has been told."""
    rows = embedding(8)
    sender.encode(rows)
    before = started(manager, address, 1)
    assert sender.answer(sender.hear()) == SUCCESS
    before.wait(WAIT_S)
    sender.pointers.clear()
    lost = started(manager, address, 2)
    frames = sender.hear()
    assert not sender.pointers, "the receiver cannot know"
    sender.report(frames, FAILED)
    with pytest.raises(PeerGone):
        lost.wait(WAIT_S)
    receiver = started(manager, address, 3)
    assert sender.answer(sender.hear()) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)


def test_an_encode_side_that_is_back_at_another_port_is_found_there(network, manager, sender, bootstrap, address):
    sender.encode(embedding(8))
    half = started(manager, address, 1)
    sender.hear()
    successor = OriginSender(PeerDouble(network))
    register_rank(bootstrap, successor.port)
    rows = embedding(30, seed=2)
    successor.encode(rows)
    receiver = started(manager, address, 2)
    assert successor.answer(successor.hear()) == TRANSFERRING
    assert successor.answer(successor.hear()) == SUCCESS
    receiver.wait(WAIT_S)
    assert equal(receiver.arrays(), rows)
    assert half.poll() is KVPoll.WaitingForInput, "its own time-out ends it"
    successor.close()


def test_our_encode_side_is_restarted_under_a_language_side_of_ours(network, manager, bootstrap):
    for room in (1, 2):
        with EncodeManager(GEOMETRY, bootstrap_url=bootstrap.url, open_engine=network.open) as encode:
            eventually(lambda encode=encode: registered_port(bootstrap) == encode.port)
            sender, rows = encode.open(room), embedding(40, seed=room)
            sender.init()
            sender.send_embedding(rows)
            receiver = started(manager, bootstrap.url, room)
            receiver.wait(WAIT_S)
            sender.wait(WAIT_S)
            assert equal(receiver.arrays(), rows)


def registered_port(bootstrap) -> int:
    found = bootstrap._table.route(0, 0, 0.0)
    return 0 if found is None else found.rank_port


@pytest.mark.parametrize("while_a_room_is_open", [False, True])
def test_a_language_side_that_is_back_with_its_ports_and_other_buffers_is_served(network, while_a_room_is_open):
    """Its engine and its socket listen where those of its predecessor did."""
    with encode_manager(network) as manager:
        receiver = OriginReceiver(PeerDouble(network), "127.0.0.1", manager.port, own_port=free_port())
        receiver.register()
        rows = embedding(12)
        sender = manager.open(1)
        sender.init()
        sender.send_embedding(rows)
        receiver.init(1, [0])
        assert receiver.status() == [b"1", str(TRANSFERRING).encode()]
        if not while_a_room_is_open:
            receiver.resume(1, [1], BLOCK)
            assert receiver.status() == [b"1", str(SUCCESS).encode()]
        receiver.close()
        again = OriginReceiver(receiver.engine, "127.0.0.1", manager.port, own_port=receiver.port)
        again.register()
        if while_a_room_is_open:
            again.init(2, [0])
            assert again.status() == [b"2", str(FAILED).encode()], "the earlier buffers may still be written to"
            sender.abort()
            assert again.status() == [b"1", str(FAILED).encode()]
        second = manager.open(2)
        second.init()
        second.send_embedding(rows)
        again.init(2, [5, 4])
        assert again.status() == [b"2", str(SUCCESS).encode()]
        assert equal(again.take([5, 4], 12), rows)
        again.close()
