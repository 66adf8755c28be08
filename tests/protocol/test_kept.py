"""A receiver that begins with tokens which a killed process had received."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Restart
from embferry.protocol.errors import LeaseExpired, LocalProtocolError
from embferry.protocol.kept import KeptTokens
from embferry.protocol.messages import MAX_TOKENS
from embferry.protocol.receiver import Receiver
from embferry.protocol.settings import TransferSettings
from embferry.protocol.states import KVPoll, Phase

from .builders import (
    AT_ONCE,
    ENCODE,
    GEOMETRY,
    LANGUAGE,
    ROOM,
    TRANSPORTS,
    an_offer,
    opened,
    report_chunk,
    sent_messages,
    to_receiver,
    to_sender,
)
from .ends import Content
from .invariants import check_receiver
from .quiescence import quiesce
from .script import Script

SETTINGS = TransferSettings(**AT_ONCE)


def receiver_with(*ranges: tuple[int, int], total: int = 12) -> Receiver:
    kept = KeptTokens(total, b"content", ranges)
    return Receiver(ROOM, LANGUAGE, GEOMETRY, "language", TRANSPORTS, SETTINGS, 0.0, kept=kept)


def test_the_transfer_resumes_behind_the_kept_tokens() -> None:
    receiver = receiver_with((0, 4))
    (asked,) = sent_messages(receiver)
    assert isinstance(asked, m.Open)
    assert asked.transferred_tokens == 4
    assert receiver.wanted(0.0) is None, "nothing is granted before it is known what the peer has"
    to_receiver(receiver, an_offer(12))
    assert receiver.wanted(0.0) == (4, 8)
    receiver.grant((0, 1), 1, 0.0)
    for offset in (4, 8):
        report_chunk(receiver, 1, offset, 4)
    assert receiver.poll() is KVPoll.Success
    assert receiver.transfers == 1


def test_gaps_between_kept_tokens_are_filled() -> None:
    receiver = receiver_with((0, 4), (8, 12))
    to_receiver(receiver, an_offer(12))
    assert receiver.wanted(0.0) == (4, 4)
    receiver.grant((0,), 1, 0.0)
    assert receiver.wanted(0.0) is None
    report_chunk(receiver, 1, 4, 4)
    assert receiver.poll() is KVPoll.Success


def test_a_whole_embedding_needs_the_handshake_alone() -> None:
    receiver = receiver_with((0, 12))
    sender = opened(12, ready=0)  # the encoder has not run, and need not
    receiver.take_commands()
    to_receiver(receiver, an_offer(12))
    assert (receiver.poll(), receiver.transfers) == (KVPoll.Success, 0)
    (confirmed,) = sent_messages(receiver)
    to_sender(sender, confirmed)
    assert sender.phase is Phase.SUCCESS


@pytest.mark.parametrize("offer", [an_offer(12, digest=b"another"), an_offer(8)], ids=["content", "length"])
def test_kept_tokens_of_another_embedding_are_dropped(offer: m.Offer) -> None:
    receiver = receiver_with((0, 4))
    receiver.take_commands()
    to_receiver(receiver, offer)
    assert Restart() in receiver.take_commands()
    assert receiver.wanted(0.0) == (0, offer.total_tokens)


def test_an_offer_without_a_length_says_nothing_about_kept_tokens() -> None:
    receiver = receiver_with((0, 4))
    receiver.take_commands()
    to_receiver(receiver, an_offer(-1))
    assert receiver.take_commands() == []
    assert receiver.wanted(0.0) is None
    to_receiver(receiver, an_offer(12))
    assert receiver.wanted(0.0) == (4, 8)


def test_the_encoder_has_as_long_as_for_a_receiver_that_has_nothing() -> None:
    receiver = receiver_with((0, 4))
    to_receiver(receiver, an_offer(12))
    receiver.grant((0, 1), 1, 0.0)
    assert receiver.phase is Phase.WAITING_FOR_INPUT
    late = [error() for time, error in receiver.deadlines() if time == SETTINGS.waiting_timeout]
    assert [type(error) for error in late] == [LeaseExpired]


def test_messages_of_another_peer_do_not_count_for_kept_tokens() -> None:
    receiver = receiver_with((0, 4))
    to_receiver(receiver, an_offer(12), source=ENCODE)
    to_receiver(receiver, an_offer(12, digest=b"another"), source=ENCODE + 1)
    assert receiver.wanted(0.0) == (4, 8)


@pytest.mark.parametrize(
    ("total", "digest", "ranges"),
    [
        (-1, b"d", ()),
        (MAX_TOKENS + 1, b"d", ()),
        (4, b"", ()),
        (4, bytes(65), ()),
        (4, b"d", ((0, 5),)),
        (4, b"d", ((-1, 2),)),
        (4, b"d", ((2, 2),)),
    ],
)
def test_what_no_sender_announces_cannot_be_kept(
    total: int, digest: bytes, ranges: tuple[tuple[int, int], ...]
) -> None:
    with pytest.raises(LocalProtocolError):
        KeptTokens(total, digest, ranges)


def test_no_kept_token_is_granted_again() -> None:
    s = Script(total=6, num_blocks=1)
    s.handshake()
    s.restart_receiver(KeptTokens(6, Content(1, 6).digest, ((0, 2), (4, 6))))
    s.revoke()
    quiesce(s)
    check_receiver(s.receiver)
    assert s.receiver.machine.phase is Phase.SUCCESS
    assert s.receiver.machine.transfers == 1
