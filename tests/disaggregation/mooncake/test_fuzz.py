"""Random and malformed messages: both ends stay up, and the next room completes."""

from __future__ import annotations

import random
import struct

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingBootstrapServer

from .builders import (
    ROOM,
    WAIT_S,
    PeerDouble,
    encode_manager,
    equal,
    eventually,
    language_manager,
    refusals,
    register_rank,
)
from .engine_double import EngineNetwork
from .origin_peers import OriginReceiver, OriginSender, embedding

pytestmark = pytest.mark.integration

MESSAGES = 1500
LAST = "the last message"
ATOMS = [
    b"", b"0", b"1", b"2", b"3", b"4", b"7", b"8", b"16", b"24", b"-1", b"+1", b" 1", b"01", b"1e3", b"0x1", b"9" * 19,
    b"9" * 300, b"1,2", b"1,1", b",", b"1,,2", b"11", b"12", b"None", b"none", b"127.0.0.1", b"::1", b"h:1", b"h:0",
    b"127.0.0.1:20001", b"\xff\xfe", "٣".encode(), b"\x00" * 40, struct.pack("5Q", 1, 2, 3, 4, 5), b"AUX_DATA",
]  # fmt: skip


def messages(seed: int, shortest: int, longest: int) -> list[list[bytes]]:
    chance = random.Random(seed)
    return [[chance.choice(ATOMS) for _ in range(chance.randint(shortest, longest))] for _ in range(MESSAGES)]


def test_a_sender_survives_malformed_messages(caplog):
    network = EngineNetwork()
    with encode_manager(network) as manager:
        receiver = OriginReceiver(PeerDouble(network), "127.0.0.1", manager.port)
        for frames in messages(1, 1, 10):
            receiver.say(*frames)
        # messages that are good but for one frame
        chance = random.Random(2)
        for _ in range(MESSAGES):
            frames = [*receiver.head(chance.choice([5, 6])), b"1,2", b"1", b"8", b"16"][: chance.choice([7, 8])]
            frames[chance.randrange(4, len(frames))] = chance.choice(ATOMS)
            receiver.say(*frames)
        receiver.say(LAST.encode())
        eventually(lambda: any("a request of 1 frames" in reason for reason in refusals(caplog)[-1:]))
        assert manager._thread.is_alive()
        rows = embedding(20)
        sender = manager.open(ROOM)
        sender.init()
        sender.send_embedding(rows)
        receiver.register()
        receiver.init(ROOM, [0, 1, 2])
        told = receiver.status()
        while told[0] in (b"5", b"6"):  # inits of a session that had not registered
            assert told[1] == b"0"
            told = receiver.status()
        assert told == [str(ROOM).encode(), b"4"]
        assert equal(receiver.take([0, 1, 2], 20), rows)
        receiver.close()


def test_a_receiver_survives_malformed_statuses():
    network = EngineNetwork()
    with MooncakeEmbeddingBootstrapServer() as bootstrap, language_manager(network) as manager:
        sender = OriginSender(PeerDouble(network))
        rows = embedding(20)
        sender.encode(rows)
        receiver = manager.open(ROOM, register_rank(bootstrap, sender.port))
        receiver.init()
        frames = sender.hear()
        for bad in messages(3, 1, 5):
            sender.push("127.0.0.1", manager.port, bad)
        chance = random.Random(4)
        for _ in range(MESSAGES):
            status = chance.choice([atom for atom in ATOMS if atom != b"0"])  # a failure would be accepted
            sender.push("127.0.0.1", manager.port, [str(ROOM).encode(), status])
        sender.answer(frames)
        receiver.wait(WAIT_S)
        assert equal(receiver.arrays(), rows)
        sender.close()
