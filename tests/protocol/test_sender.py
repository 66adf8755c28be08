"""The sender's state machine, by examples."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import ReleaseSource, Send, Write
from embferry.protocol.errors import Aborted, LocalProtocolError, TransportError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.protocol.sender import Sender
from embferry.protocol.states import KVPoll, Phase

from .builders import (
    ENCODE,
    GEOMETRY,
    LANGUAGE,
    ROOM,
    TRANSPORTS,
    a_grant,
    an_open,
    new_sender,
    opened,
    other_commands,
    sent_messages,
    to_sender,
)

SUM = b"checksum"
TCP, SHM = TRANSPORTS


def finish(sender: Sender, write: Write) -> None:
    sender.write_done(write.target, write.epoch, write.offset, write.length, SUM)


def written(epoch: int, *chunks: tuple[int, int]) -> m.Written:
    return m.Written(ROOM, epoch, tuple(m.Chunk(offset, length, SUM) for offset, length in chunks))


def test_the_offer_is_sent_before_the_encoder_has_run_and_again_once_the_length_is_known() -> None:
    sender = new_sender()
    to_sender(sender, an_open(), target=0)
    assert sent_messages(sender) == [m.Offer(ROOM, 1, 1, "shm", -1, b"")]
    sender.announce(10, b"content", (10, -3))
    offer = m.Offer(ROOM, 1, 1, "shm", 10, b"content", (10, -3))
    assert sent_messages(sender) == [offer]
    sender.announce(10, b"content")  # repeated: nothing new
    assert sent_messages(sender) == []
    to_sender(sender, an_open(), target=0)
    assert sent_messages(sender) == [offer]
    assert sender.poll() is KVPoll.WaitingForInput


def test_the_first_common_transport_is_chosen() -> None:
    sender = new_sender()
    to_sender(sender, an_open(transports=TRANSPORTS[:1]), target=0)
    assert [offer.transport for offer in sent_messages(sender) if isinstance(offer, m.Offer)] == ["tcp"]


def test_whole_blocks_are_written_as_tokens_are_produced() -> None:
    sender = opened(10, ready=0)
    to_sender(sender, a_grant(1, 0, 10, (3, 2), (9, 1)))
    assert sent_messages(sender) == []
    assert sender.poll() is KVPoll.Transferring
    sender.produce(3)
    assert other_commands(sender) == []
    sender.produce(9)
    assert other_commands(sender) == [
        Write(LANGUAGE, 1, 0, 4, (3,), SHM, True),
        Write(LANGUAGE, 1, 4, 4, (4,), SHM, True),
    ]
    sender.produce(10)
    assert other_commands(sender) == [Write(LANGUAGE, 1, 8, 2, (9,), SHM, True)]
    sender.write_done(LANGUAGE, 1, 4, 4, SUM)
    assert sent_messages(sender) == [written(1, (4, 4))]


def test_the_size_of_chunks_and_the_number_in_flight_are_bounded() -> None:
    sender = opened(30, chunk_bytes=2 * 4 * 8 + 7, writes_in_flight=2)
    to_sender(sender, a_grant(1, 0, 30, (0, 8)))
    first, second = other_commands(sender)
    assert [(w.offset, w.length, w.blocks) for w in (first, second)] == [(0, 8, (0, 1)), (8, 8, (2, 3))]
    finish(sender, second)
    third = other_commands(sender)
    assert [(w.offset, w.length, w.blocks) for w in third] == [(16, 8, (4, 5))]
    finish(sender, first)
    assert [(w.offset, w.length, w.blocks) for w in other_commands(sender)] == [(24, 6, (6, 7))]


def test_resumed_transfers_may_start_at_any_token_of_scattered_blocks() -> None:
    sender = opened(20, writes_in_flight=9)
    to_sender(sender, a_grant(1, 0, 7, (15, 1), (2, 1)))
    to_sender(sender, a_grant(2, 7, 13, (1, 1), (4, 2), (0, 1)))
    assert [(w.epoch, w.offset, w.length, w.blocks) for w in other_commands(sender)] == [
        (1, 0, 4, (15,)),
        (1, 4, 3, (2,)),
        (2, 7, 4, (1,)),
        (2, 11, 4, (4,)),
        (2, 15, 4, (5,)),
        (2, 19, 1, (0,)),
    ]


def test_a_repeated_grant_is_answered_but_not_written_again() -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    first, second = other_commands(sender)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    assert sent_messages(sender) == [m.Pending(ROOM, 1)]
    finish(sender, first)
    sender.write_failed(LANGUAGE, 1, second.offset, second.length, TransportError("x" * 2000, retryable=False))
    sender.take_commands()
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    failed = m.WriteFailed(ROOM, 1, 4, 4, "transport_error", "x" * m.MAX_TEXT, True)
    assert sent_messages(sender) == [written(1, (0, 4)), failed]


def test_many_reports_are_repeated_in_frames_that_fit() -> None:
    geometry = Geometry(GEOMETRY.layout, m.MAX_CHUNKS + 1, 1)
    sender = new_sender(total=m.MAX_CHUNKS + 1, ready=m.MAX_CHUNKS + 1, chunk_bytes=8, writes_in_flight=1)
    to_sender(sender, an_open(geometry=geometry), target=0)
    sender.take_commands()
    grant = a_grant(1, 0, m.MAX_CHUNKS + 1, (0, m.MAX_CHUNKS + 1))
    to_sender(sender, grant)
    while writes := other_commands(sender):
        finish(sender, writes[0])
    to_sender(sender, grant)
    reports = [body for body in sent_messages(sender) if isinstance(body, m.Written)]
    assert [len(report.chunks) for report in reports] == [m.MAX_CHUNKS, 1]


def test_a_grant_drained_before_it_arrives_is_never_written() -> None:
    sender = opened(8)
    to_sender(sender, m.Drain(ROOM, (1,)))
    assert sent_messages(sender) == [m.Drained(ROOM, (1,))]
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    assert sender.take_commands() == []


def test_drained_is_reported_when_the_last_write_has_ended() -> None:
    sender = opened(16, writes_in_flight=2)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    to_sender(sender, a_grant(2, 8, 8, (2, 2)))
    first, second = other_commands(sender)
    to_sender(sender, m.Drain(ROOM, (1, 2)))
    assert sent_messages(sender) == [m.Drained(ROOM, (2,))]
    finish(sender, first)
    assert sender.take_commands() == []
    finish(sender, second)
    assert sent_messages(sender) == [m.Drained(ROOM, (1,))]
    to_sender(sender, m.Drain(ROOM, (1,)))
    assert sent_messages(sender) == [m.Drained(ROOM, (1,))]  # at every request


def test_grants_below_the_floor_are_forgotten_and_never_written() -> None:
    sender = opened(16, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 4, (0, 1)))
    (first,) = other_commands(sender)
    finish(sender, first)
    to_sender(sender, a_grant(2, 4, 8, (1, 2)))
    (second,) = other_commands(sender)
    to_sender(sender, m.Drain(ROOM, (3,)))
    to_sender(sender, m.Progress(ROOM, 4, 4))
    current = sender.destinations[LANGUAGE]
    assert (set(current.grants), current.refused) == ({2}, set())  # a write of the second is in flight
    sender.take_commands()
    finish(sender, second)
    assert other_commands(sender) == []  # no other write of it is started
    to_sender(sender, a_grant(1, 0, 4, (0, 1), floor=2))  # an old one, with an old floor
    assert sender.take_commands() == []


def test_tokens_that_were_granted_again_are_not_written_under_the_earlier_grant() -> None:
    sender = opened(12, ready=4)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    assert other_commands(sender) == [Write(LANGUAGE, 1, 0, 4, (0,), SHM, True)]
    to_sender(sender, a_grant(3, 4, 4, (2, 1)))
    to_sender(sender, a_grant(2, 4, 8, (3, 2)))  # overtaken by the third
    sender.produce(12)
    assert other_commands(sender) == [Write(LANGUAGE, 3, 4, 4, (2,), SHM, True)]


def test_an_acknowledgement_of_anything_stops_no_grant() -> None:
    """It may be late, and concern the content of another sender."""
    sender = opened(8)
    to_sender(sender, m.Progress(ROOM, 8, 1))
    to_sender(sender, a_grant(1, 0, 4, (0, 1)))
    assert other_commands(sender) == [Write(LANGUAGE, 1, 0, 4, (0,), SHM, True)]


def test_every_confirm_is_answered_and_the_first_releases_the_embedding() -> None:
    sender = opened(4)
    to_sender(sender, m.Confirm(ROOM, 3))  # of another length than was announced
    assert sender.take_commands() == []
    to_sender(sender, m.Confirm(ROOM, 4), 1.0)
    assert sender.poll() is KVPoll.Success
    assert sender.take_commands() == [ReleaseSource(), Send(m.Closed(ROOM), LANGUAGE)]
    to_sender(sender, m.Confirm(ROOM, 4), 2.0)
    assert sent_messages(sender) == [m.Closed(ROOM)]
    to_sender(sender, an_open(), 2.0, target=0)  # a late copy
    assert sender.take_commands() == []
    to_sender(sender, a_grant(1, 0, 4, (0, 1)), 2.0)
    assert [type(body) for body in sent_messages(sender)] == [m.Abort]
    to_sender(sender, an_open(), 2.0, source=101, target=0)
    assert [type(body) for body in sent_messages(sender)] == [m.Abort]
    assert (sender.next_timeout(), sender.settled(5.9), sender.settled(6.0)) == (None, False, True)
    sender.expire(1000.0)


@pytest.mark.parametrize("heard", [True, False])
def test_an_abort_releases_the_embedding_after_the_last_write(heard: bool) -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    first, second = other_commands(sender)
    if heard:
        to_sender(sender, m.Abort(ROOM, "aborted", "asked for"))
        assert sent_messages(sender) == [m.Closed(ROOM)]
    else:
        sender.abort(Aborted("asked for", room=ROOM), 0.0)
        sender.abort(Aborted("once more", room=ROOM), 0.0)
        assert sent_messages(sender) == [m.Abort(ROOM, "aborted", "asked for", 1)]
    assert str(sender.error) == "[aborted] room 7: asked for"
    finish(sender, first)
    assert other_commands(sender) == []
    assert not sender.settled(100.0)
    finish(sender, second)
    assert ReleaseSource() in other_commands(sender)
    assert (sender.source_released, sender.poll()) == (True, KVPoll.Failed)
    to_sender(sender, an_open(2), target=0)
    to_sender(sender, a_grant(2, 0, 8, (0, 2)))
    assert [(type(body), body.generation) for body in sent_messages(sender)] == [(m.Abort, 2), (m.Abort, 1)]
    sender.produce(8)
    assert sender.take_commands() == []


def test_an_aborted_sender_refuses_receivers_that_come_later() -> None:
    sender = new_sender()
    sender.abort(Aborted("asked for", room=ROOM), 0.0)
    assert sender.take_commands() == [ReleaseSource()]
    to_sender(sender, an_open(3), target=0)
    assert sent_messages(sender) == [m.Abort(ROOM, "aborted", "asked for", 3)]


def test_a_new_receiver_replaces_the_old_one() -> None:
    sender = opened(8, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    (write,) = other_commands(sender)
    to_sender(sender, an_open(), source=101, target=0)
    assert [type(body) for body in sent_messages(sender)] == [m.Offer]
    assert sender.phase is Phase.TRANSFERRING
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    to_sender(sender, an_open(), target=0)  # a late copy of the old receiver's
    assert sent_messages(sender) == [m.Unknown(ROOM, ENCODE)]
    to_sender(sender, m.Drain(ROOM, (1,)))
    finish(sender, write)
    assert sent_messages(sender) == [m.Drained(ROOM, (1,))]  # the old receiver is drained all the same
    to_sender(sender, an_open(2), target=0)  # the old receiver opens another generation
    assert [type(body) for body in sent_messages(sender)] == [m.Offer]


def test_a_receiver_without_grants_is_replaced_too() -> None:
    sender = opened(8)
    to_sender(sender, an_open(), source=101, target=0)
    assert sender.phase is Phase.WAITING_FOR_INPUT


def test_a_new_generation_ends_the_grants_of_the_earlier_one() -> None:
    sender = opened(8, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    to_sender(sender, m.Progress(ROOM, 4, 1))
    (write,) = other_commands(sender)
    to_sender(sender, an_open(2), target=0)
    to_sender(sender, an_open(1), target=0)  # late
    assert [body.generation for body in sent_messages(sender)] == [2]
    finish(sender, write)
    assert other_commands(sender) == []
    to_sender(sender, a_grant(2, 0, 4, (2, 1)))
    assert other_commands(sender) == [Write(LANGUAGE, 2, 0, 4, (2,), SHM, True)]


def test_messages_of_unknown_sessions_are_answered_with_unknown() -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)), source=101)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)), target=ENCODE - 1)
    assert sent_messages(sender) == [m.Unknown(ROOM, ENCODE), m.Unknown(ROOM, ENCODE - 1)]
    to_sender(sender, m.Closed(ROOM))  # a sender's message, sent to a sender
    assert sender.take_commands() == []


@pytest.mark.parametrize(
    ("message", "code", "how"),
    [
        (an_open(versions=(2, 3)), "version_mismatch", "upgrade the older peer"),
        (
            an_open(geometry=Geometry(Layout((Field("input_embeddings", "float32", 8),)), 16, 4)),
            "layout_mismatch",
            "input_embeddings uint8[8] here, input_embeddings float32[8] there",
        ),
        (an_open(geometry=Geometry(GEOMETRY.layout, 0, 4)), "layout_mismatch", "out of bounds"),
        (an_open(transports=(m.TransportAddress("unknown", b""),)), "transport_error", "configure one that both have"),
    ],
)
def test_an_incompatible_receiver_is_refused_with_the_difference(message: m.Open, code: str, how: str) -> None:
    sender = new_sender(total=8)
    to_sender(sender, message, target=0)
    (refusal,) = sent_messages(sender)
    assert isinstance(refusal, m.Abort)
    assert (refusal.code, refusal.generation) == (code, 1)
    assert how in refusal.detail
    assert sender.poll() is KVPoll.Bootstrapping  # another receiver may come


def test_a_session_cannot_change_its_buffers() -> None:
    sender = opened(8)
    to_sender(sender, an_open(2, geometry=Geometry(GEOMETRY.layout, 1 << 31, 4)), target=0)
    (refusal,) = sent_messages(sender)
    assert isinstance(refusal, m.Abort)
    assert refusal.code == "remote_protocol_error"


@pytest.mark.parametrize(
    "grant",
    [
        a_grant(1, 0, 4, (16, 1)),
        a_grant(1, 0, 4, (0, 1 << 32)),
        a_grant(1, 0, 8, (0, 1), (0, 1)),
        a_grant(1, 0, 12, (0, 2), (1, 1)),
        a_grant(1, 0, 4, (0, 2)),
        a_grant(1, 0, 9, (0, 2)),
    ],
    ids=["outside", "2**32 blocks", "twice", "overlap", "too few tokens", "too many tokens"],
)
def test_an_invalid_grant_is_refused_and_the_transfer_continues(grant: m.Grant) -> None:
    sender = opened(8)
    to_sender(sender, grant)
    (refusal,) = sent_messages(sender)
    assert (type(refusal), refusal.code) == (m.Abort, "remote_protocol_error")
    assert sender.poll() is KVPoll.WaitingForInput


@pytest.mark.parametrize(
    ("total", "digest", "aux"),
    [
        (-1, b"x", ()),
        (1 << 40, b"x", ()),
        (1, b"", ()),
        (1, b"x" * 65, ()),
        (1, b"x", (0,) * 17),
        (1, b"x", (1 << 31,)),
    ],
)
def test_an_invalid_announcement_is_an_error_of_the_caller(total: int, digest: bytes, aux: tuple[int, ...]) -> None:
    with pytest.raises(LocalProtocolError):
        new_sender().announce(total, digest, aux)


def test_an_embedding_is_announced_once_and_only_grows() -> None:
    sender = new_sender()
    with pytest.raises(LocalProtocolError, match="-1 announced"):
        sender.produce(1)
    sender.announce(8, b"content")
    with pytest.raises(LocalProtocolError, match="announced once"):
        sender.announce(8, b"another")
    sender.produce(4)
    for ready in (3, 9):
        with pytest.raises(LocalProtocolError, match=f"{ready} tokens ready"):
            sender.produce(ready)
