"""A transport fails during a transfer, which resumes over the next common transport."""

from __future__ import annotations

import pytest

from embferry.protocol import messages as m
from embferry.protocol.commands import Admit, Connect, Revoke, Send, Write
from embferry.protocol.errors import TransportError, TransportStalled
from embferry.protocol.receiver import Receiver
from embferry.protocol.sender import Sender
from embferry.protocol.states import Phase

from .builders import (
    ENCODE,
    LANGUAGE,
    ROOM,
    SETTINGS,
    TRANSPORTS,
    a_grant,
    an_offer,
    an_open,
    new_receiver,
    new_sender,
    offered,
    opened,
    other_commands,
    sent_messages,
    to_receiver,
    to_sender,
)
from .ends import LAYOUT
from .faults import break_transport
from .quiescence import quiesce
from .script import Script
from .simulation import TRANSPORTS as SIMULATED_TRANSPORTS

TCP, SHM = TRANSPORTS
BROKEN = TransportError("broken")


def talk(receiver: Receiver, sender: Sender) -> None:
    """Delivers every message of both ends until they are silent."""
    silent = False
    while not silent:
        to_peer = [command for command in receiver.take_commands() if isinstance(command, Send)]
        for command in to_peer:
            sender.receive(LANGUAGE, command.target, command.body, 0.0)
        back = [command for command in sender.take_commands() if isinstance(command, Send)]
        for command in back:
            to_receiver(receiver, command.body)
        silent = not (to_peer or back)


def writes(sender: Sender) -> list[Write]:
    return [command for command in other_commands(sender) if isinstance(command, Write)]


def fail(sender: Sender, write: Write, error: TransportError = BROKEN) -> None:
    sender.write_failed(LANGUAGE, write.epoch, write.offset, write.length, error)


def bodies(sender: Sender) -> list[m.Body | Connect]:
    return [c.body if isinstance(c, Send) else c for c in sender.take_commands() if isinstance(c, Send | Connect)]


def changed(fail_from: int, length: int, epoch: int = 1) -> list[object]:
    """Returns what the sender does when it changes from shm to tcp: connects, offers, fails the rest of the grant."""
    why = "shm was given up in favour of tcp"
    return [
        Connect(LANGUAGE, TCP),
        m.Offer(ROOM, 1, 1, "tcp", 16, b"content"),
        m.WriteFailed(ROOM, epoch, fail_from, length, "transport_error", why, True),
    ]


def test_the_sender_connects_when_it_is_opened() -> None:
    sender = opened(4)
    to_sender(sender, an_open(2), target=0)
    assert other_commands(sender) == []  # the sender is connected already
    other = LANGUAGE + 1
    to_sender(sender, an_open(), source=other, target=0)
    assert other_commands(sender) == [Connect(other, SHM)]


def test_writes_that_fail_together_count_once_and_a_good_one_resets_the_count() -> None:
    sender = opened(40, writes_in_flight=2)
    to_sender(sender, a_grant(1, 0, 40, (0, 10)))
    for _ in range(2):
        first, second = writes(sender)
        fail(sender, first)
        fail(sender, second)
        good, other = writes(sender)
        sender.write_done(LANGUAGE, 1, good.offset, good.length, b"checksum")
        sender.write_done(LANGUAGE, 1, other.offset, other.length, b"checksum")
    assert not sender.destinations[LANGUAGE].transports.given_up


def test_after_two_failures_in_a_row_the_next_transport_is_offered() -> None:
    sender = opened(16, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    fail(sender, *writes(sender))
    (second,) = writes(sender)
    sender.take_commands()
    fail(sender, second)
    failed = m.WriteFailed(ROOM, 1, 4, 4, "transport_error", "broken", True)
    assert bodies(sender) == [*changed(8, 8), failed]


def test_a_failure_that_is_not_retryable_changes_the_transport_at_once() -> None:
    sender = opened(16, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    fail(sender, *writes(sender), TransportError("no such host", retryable=False))
    failed = m.WriteFailed(ROOM, 1, 0, 4, "transport_error", "no such host", True)
    assert bodies(sender) == [*changed(4, 12), failed]


def test_a_stall_changes_the_transport_at_once_and_is_retryable_where_there_is_no_other() -> None:
    sender = opened(16, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    fail(sender, *writes(sender), TransportStalled("nothing moves"))
    failed = m.WriteFailed(ROOM, 1, 0, 4, "transport_stalled", "nothing moves", True)
    assert bodies(sender) == [*changed(4, 12), failed]
    to_sender(sender, a_grant(2, 0, 16, (0, 4), transport="tcp"))
    first, *_ = writes(sender)
    fail(sender, first, TransportStalled("nothing moves"))
    assert sender.destinations[LANGUAGE].transports.current == TCP
    assert next(body for body in bodies(sender) if isinstance(body, m.WriteFailed)).retryable


def test_a_write_refused_after_a_new_generation_does_not_count_against_the_transport() -> None:
    sender = opened(16, writes_in_flight=1)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    (write,) = writes(sender)
    to_sender(sender, an_open(2), target=0)
    sender.take_commands()
    fail(sender, write, TransportError("no open window", retryable=False))
    assert not sender.destinations[LANGUAGE].transports.given_up
    to_sender(sender, a_grant(2, 0, 16, (0, 4)))
    assert [write.transport for write in writes(sender)] == [SHM]


def test_a_grant_over_an_abandoned_transport_is_answered_with_the_offer_first() -> None:
    sender = opened(16)
    sender.transport_failed(LANGUAGE, "shm")
    sender.take_commands()
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    offer, failed = changed(0, 8)[1:]
    assert bodies(sender)[:2] == [offer, failed]
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    assert bodies(sender) == [failed]
    to_sender(sender, a_grant(2, 0, 8, (0, 2), transport="tcp"))
    assert [write.transport for write in writes(sender)] == [TCP, TCP]


def test_the_last_transport_is_never_abandoned() -> None:
    sender = opened(8)
    for transport in ("shm", "tcp", "tcp", "shm"):
        sender.transport_failed(LANGUAGE, transport)
    assert sender.destinations[LANGUAGE].transports.current == TCP
    to_sender(sender, a_grant(1, 0, 4, (0, 1), transport="tcp"))
    sender.take_commands()
    fail(sender, Write(LANGUAGE, 1, 0, 4, (0,), TCP, True), TransportError("no", retryable=False))
    assert bodies(sender) == [m.WriteFailed(ROOM, 1, 0, 4, "transport_error", "no", False)]


LOST = TransportError("the engine has failed", retryable=False)


def test_a_receiver_that_loses_a_transport_revokes_its_grants_and_opens_the_room_with_the_rest() -> None:
    receiver = offered(8)
    receiver.grant((0, 1), 1, 0.0)
    receiver.take_commands()
    receiver.transport_lost("unknown", LOST, 1.0)
    assert receiver.take_commands() == []
    receiver.transport_lost("tcp", LOST, 1.0)
    revoke, send = receiver.take_commands()
    assert revoke == Revoke(1)
    assert send == Send(an_open(2, transports=(SHM,)), 0)
    to_receiver(receiver, an_offer(8), 1.0)  # late, over the lost transport
    assert receiver.peer == 0
    to_receiver(receiver, an_offer(8, generation=2, transport="shm"), 1.0)
    receiver.revoked(1)
    receiver.grant((0, 1), 2, 1.0)
    assert Admit(2, (0, 1), "shm", b"") in receiver.take_commands()
    receiver.transport_lost("shm", LOST, 2.0)
    assert receiver.error is LOST
    assert Revoke(2) in receiver.take_commands()


@pytest.mark.parametrize("shared", [True, False], ids=["another is shared", "no other is shared"])
def test_a_transport_that_is_of_no_use_to_one_transfer_is_left(shared: bool) -> None:
    """If there is no other, both ends fail with the cause."""
    cause = TransportError("no descriptors", retryable=False)
    own = (*TRANSPORTS, m.TransportAddress("http", b"")) if shared else TRANSPORTS[:1]
    receiver, sender = new_receiver(), Sender(ROOM, ENCODE, LAYOUT, own, SETTINGS, 0.0)
    sender.announce(8, b"content")
    sender.produce(8)
    talk(receiver, sender)
    assert receiver.transport == "tcp"
    receiver.grant((0, 1), 1, 0.0)
    receiver.transport_lost("tcp", cause, 0.0)
    talk(receiver, sender)
    if shared:
        assert (receiver.transport, receiver.error, sender.error) == ("shm", None, None)
        assert receiver.retry_policy.lost_in_a_row == 0
    else:
        assert receiver.error is cause
        assert sender.error is not None
        assert (sender.error.code, sender.error.detail) == ("transport_error", "no descriptors")
        assert receiver.peer_knows


def test_losing_a_transport_is_no_loss_of_the_peer() -> None:
    receiver = offered(8, max_peer_losses=1)
    receiver.transport_lost("shm", LOST, 1.0)
    to_receiver(receiver, an_offer(8, generation=2), 1.0)
    receiver.peer_lost(1.0)
    assert receiver.error is None


def test_a_receiver_that_loses_a_transport_while_it_waits_for_another_peer_tells_the_next_one() -> None:
    receiver = offered(8)
    receiver.failover.timeout = 5.0
    to_receiver(receiver, m.Abort(ROOM, "aborted", "shutting down", 0))
    receiver.take_commands()
    receiver.transport_lost("tcp", LOST, 1.0)
    assert receiver.take_commands() == []
    receiver.redirected(2.0)
    (asked,) = sent_messages(receiver)
    assert isinstance(asked, m.Open)
    assert asked.transports == (SHM,)


def test_a_session_that_opens_the_room_again_with_fewer_transports_is_served_over_the_rest() -> None:
    sender = opened(16)
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    sender.take_commands()
    to_sender(sender, an_open(2, transports=(TCP,)), target=0)
    assert bodies(sender) == [Connect(LANGUAGE, TCP), m.Offer(ROOM, 2, 1, "tcp", 16, b"content")]
    to_sender(sender, a_grant(2, 0, 16, (0, 4), transport="shm"))  # a correct receiver does not
    assert [type(body) for body in bodies(sender)][:2] == [m.Offer, m.WriteFailed]
    to_sender(sender, a_grant(3, 0, 4, (0, 1), transport="tcp"))
    assert not [write for write in writes(sender) if write.transport != TCP]


@pytest.mark.parametrize(
    ("generation", "transports"),
    [
        (1, (TCP,)),
        (2, (TCP, SHM, m.TransportAddress("http", b""))),
        (2, (m.TransportAddress("tcp", b"another handle"),)),
    ],
)
def test_a_session_cannot_change_its_transports(generation: int, transports: tuple[m.TransportAddress, ...]) -> None:
    sender = opened(8)
    to_sender(sender, an_open(generation, transports=transports), target=0)
    (refusal,) = sent_messages(sender)
    assert isinstance(refusal, m.Abort)
    assert refusal.code == "remote_protocol_error"


def test_a_session_whose_last_common_transport_is_lost_is_refused() -> None:
    sender = opened(8)
    to_sender(sender, an_open(transports=(TCP, m.TransportAddress("http", b""))), source=LANGUAGE + 1, target=0)
    sender.take_commands()
    to_sender(sender, an_open(2, transports=(m.TransportAddress("http", b""),)), source=LANGUAGE + 1, target=0)
    (refusal,) = sent_messages(sender)
    assert isinstance(refusal, m.Abort)
    assert refusal.code == "transport_error"
    sender.produce(8)  # what the session had opened before still holds
    to_sender(sender, a_grant(1, 0, 4, (0, 1), transport="tcp"), source=LANGUAGE + 1)
    assert [write.transport for write in writes(sender)] == [TCP]


def test_a_transport_that_was_given_up_is_tried_again_if_the_others_are_lost() -> None:
    sender = opened(8)
    sender.transport_failed(LANGUAGE, "shm")
    sender.take_commands()
    to_sender(sender, an_open(2, transports=(SHM,)), target=0)
    assert bodies(sender) == [Connect(LANGUAGE, SHM), m.Offer(ROOM, 2, 1, "shm", 8, b"content")]
    to_sender(sender, a_grant(1, 0, 4, (0, 1)))
    assert [write.transport for write in writes(sender)] == [SHM]


def test_a_sender_that_loses_a_transport_switches_every_receiver_and_does_not_choose_it_again() -> None:
    sender = opened(16, writes_in_flight=1)
    former = LANGUAGE + 1
    to_sender(sender, an_open(), source=former, target=0)
    to_sender(sender, an_open(2), target=0)  # the first one is served again
    to_sender(sender, a_grant(1, 0, 16, (0, 4)))
    (write,) = writes(sender)
    sender.transport_lost("shm", LOST, 1.0)
    assert bodies(sender) == [
        Connect(LANGUAGE, TCP),
        m.Offer(ROOM, 2, 1, "tcp", 16, b"content"),
        m.WriteFailed(ROOM, 1, 4, 12, "transport_error", "shm was given up in favour of tcp", True),
        Connect(former, TCP),
    ]
    fail(sender, write, LOST)
    assert bodies(sender) == [m.WriteFailed(ROOM, 1, 0, 4, "transport_error", "the engine has failed", True)]
    to_sender(sender, an_open(), source=former + 1, target=0)
    assert bodies(sender) == [Connect(former + 1, TCP), m.Offer(ROOM, 1, 1, "tcp", 16, b"content")]
    sender.transport_lost("tcp", LOST, 2.0)
    assert sender.error is LOST
    assert [type(body) for body in sent_messages(sender)] == [m.Abort]


def test_a_sender_fails_if_its_receiver_cannot_be_reached_over_any_other_transport() -> None:
    sender = new_sender(total=8, ready=8)
    to_sender(sender, an_open(transports=(SHM,)), target=0)
    to_sender(sender, a_grant(1, 0, 8, (0, 2)))
    in_flight = writes(sender)
    sender.transport_lost("shm", LOST, 1.0)
    assert sender.error is LOST
    for write in in_flight:
        fail(sender, write, LOST)
    assert sender.source_released


def test_a_grant_over_an_unknown_transport_is_refused() -> None:
    sender = opened(8)
    to_sender(sender, a_grant(1, 0, 8, (0, 2), transport="unknown"))
    (refusal,) = sent_messages(sender)
    assert isinstance(refusal, m.Abort)
    assert refusal.code == "remote_protocol_error"


def test_a_receiver_grants_over_the_new_transport_and_ignores_failures_of_the_old_one() -> None:
    receiver = offered(8, max_bad_chunks=1)
    receiver.grant((0, 1), 1, 0.0)
    receiver.take_commands()
    to_receiver(receiver, an_offer(8, transport="shm"))
    for offset in (0, 4):
        to_receiver(receiver, m.WriteFailed(ROOM, 1, offset, 4, "transport_error", "given up", True))
    assert receiver.error is None
    assert receiver.wanted(0.0) == (0, 8)
    receiver.grant((2, 3), 2, 0.0)
    commands = receiver.take_commands()
    assert Admit(2, (2, 3), "shm", b"") in commands
    assert Send(m.Grant(ROOM, 2, 0, 8, ((2, 2),), 2, "shm"), ENCODE) in commands


def test_the_sender_s_address_is_passed_on_with_the_window() -> None:
    receiver = offered(8)
    to_receiver(receiver, m.Offer(ROOM, 1, 1, "tcp", 8, b"content", (8, 3), b"there"))
    receiver.grant((0, 1), 1, 0.0)
    assert Admit(1, (0, 1), "tcp", b"there") in receiver.take_commands()


def test_checksums_are_omitted_only_if_the_receiver_does_not_verify() -> None:
    sender = opened(4)
    to_sender(sender, m.Open(ROOM, 2, (1, 1), an_open().geometry, "language", TRANSPORTS, 0, verify=False), target=0)
    to_sender(sender, a_grant(1, 0, 4, (0, 1)))
    (write,) = writes(sender)
    assert not write.checksum
    receiver = offered(4, verify=False)
    receiver.grant((0,), 1, 0.0)
    to_receiver(receiver, m.Written(ROOM, 1, (m.Chunk(0, 4, None),)))
    receiver.verified_chunk(1, 0, matches=True, now=0.0)
    assert receiver.phase is Phase.SUCCESS


@pytest.mark.parametrize("lost", [(), (m.Offer,), (m.WriteFailed,), (m.Offer, m.WriteFailed)])
def test_a_transfer_succeeds_over_the_second_transport(lost: tuple[type[m.Body], ...]) -> None:
    s = Script(total=12, num_blocks=4)
    s.handshake()
    s.arrives(m.Grant)
    s.chunk_arrives()
    break_transport(s, SIMULATED_TRANSPORTS[0])
    for kind in lost:
        s.loses(kind)
    quiesce(s)
    assert s.receiver.machine.phase is Phase.SUCCESS
    assert s.receiver.machine.transport == SIMULATED_TRANSPORTS[1]
