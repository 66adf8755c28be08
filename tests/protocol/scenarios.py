"""Short scripted simulations, one for each guard that a random search finds too slowly.

Each breaks no invariant with its guard and breaks one without it.
"""

from __future__ import annotations

from embferry.protocol.kept import KeptTokens
from embferry.protocol.messages import Abort, Drain, Drained, Grant, Offer, Open, Progress, Written

from .ends import Content
from .faults import lie
from .script import ROOM, Script


def late_grant_meets_a_new_sender() -> Script:
    """A completed grant arrives again, at a new sender that does not know it."""
    s = Script(total=4, num_blocks=1)
    s.handshake()
    s.keep_copy(Grant)
    s.arrives(Grant)
    s.chunk_arrives()
    s.consume_first()
    s.replace_encoder()
    s.revoke()  # the last block granted to the lost sender is free, and is granted to the new one
    s.copy_arrives()
    s.complete_writes()
    return s


def late_grant_below_the_floor() -> Script:
    """A closed grant arrives again, after its block was granted under another epoch."""
    s = Script(total=4, num_blocks=1)
    s.handshake()
    s.keep_copy(Grant)
    s.arrives(Grant)
    s.chunk_arrives()
    s.consume_first()
    s.loses(Progress)
    s.arrives(Grant)  # the second grant, whose floor says that the first is closed
    s.complete(s.memory.in_flight[0])
    s.copy_arrives()
    s.complete_writes()
    return s


def grant_after_its_drain() -> Script:
    """A grant arrives after it was drained, when its blocks belong to another room."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.keep_copy(Grant)
    s.loses(Grant)
    s.abort_receiver()
    s.loses(Abort)
    s.arrives(Drain, Drained)
    s.start_another_room()
    s.copy_arrives()
    s.complete_writes()
    return s


def repeated_grant() -> Script:
    """A partly written grant arrives again, when one of its blocks belongs to another room."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.keep_copy(Grant)
    s.arrives(Grant)
    s.chunk_arrives()
    s.consume_first()
    s.loses(Progress)
    s.start_another_room()
    s.complete(s.memory.in_flight[0])
    s.copy_arrives()
    s.complete_writes()
    return s


def grant_that_was_overtaken() -> Script:
    """The link breaks, the same tokens arrive under a second grant, then the first grant arrives."""
    s = Script(total=4, num_blocks=4)
    s.handshake()
    s.keep_copy(Grant)
    s.loses(Grant)
    s.break_link()
    s.arrives(Grant)
    s.chunk_arrives()
    s.arrives(Progress)
    s.copy_arrives()
    return s


def report_from_before_the_loss() -> Script:
    """The link breaks, the same tokens are written under a second grant, then the report of the first one arrives."""
    s = Script(total=4, num_blocks=4)
    s.handshake()
    s.arrives(Grant)
    s.complete(s.memory.in_flight[0])
    s.keep_copy(Written)
    s.loses(Written)
    s.break_link()
    s.arrives(Grant)
    s.complete(s.memory.in_flight[-1])
    s.arrives(Written)
    s.verify(s.receiver)
    s.copy_arrives()
    while s.receiver.checks:
        s.verify(s.receiver)
    return s


def repeated_report() -> Script:
    """A report arrives again, when the block it names is free."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.complete(s.memory.in_flight[0])
    s.keep_copy(Written)
    s.arrives(Written)
    s.verify(s.receiver)
    s.consume_first()
    s.copy_arrives()
    return s


def successor_is_asked_to_drain() -> Script:
    """A writer dies. Its successor knows of no write, and would report a drain of them as complete."""
    s = Script(total=4, num_blocks=4)
    s.handshake()
    s.arrives(Grant)
    s.replace_encoder()
    s.tick(0.1)
    s.arrives_if_sent(Drain, Drained)
    s.complete_writes()
    return s


def successor_has_not_said_what_it_has() -> Script:
    """A new sender has another embedding of the same length, and its offer is lost."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.chunk_arrives()
    s.consume_first()
    s.replace_encoder(2, ready=False)
    s.loses(Grant)
    s.run()
    s.tick(0.1)
    s.encoder.produce(4)
    s.run()
    s.loses(Offer)
    s.loses(Open)
    s.arrives_if_sent(Grant)
    if s.memory.in_flight[1:]:
        s.complete(s.memory.in_flight[-1])
        s.arrives(Written)
        s.verify(s.receiver)
    return s


def successor_has_another_embedding() -> Script:
    """A new sender offers another embedding of the same length."""
    s = Script(total=4, num_blocks=4)
    s.handshake()
    s.arrives(Grant)
    s.chunk_arrives()
    s.replace_encoder(2)
    s.arrives(Grant)
    s.complete(s.memory.in_flight[-1])
    s.arrives(Written)
    s.verify(s.receiver)
    s.consume_first()
    return s


def kept_tokens_are_of_another_embedding() -> Script:
    """A receiver begins with tokens of another embedding of the same length, which a killed process had received."""
    s = Script(total=4, num_blocks=2)
    s.restart_receiver(KeptTokens(4, Content(2, 4).digest, ((0, 2),)))
    s.handshake()
    return s


def kept_tokens_are_of_an_earlier_peer() -> Script:
    """A process is killed with half of an embedding. Its sender is replaced by one that has another of that length."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.chunk_arrives()
    s.start_encoder(ROOM, Content(2, 4)).produce(4)
    s.restart_receiver(s.receiver.has())
    s.revoke()
    s.handshake()
    return s


def offer_changes_its_length() -> Script:
    """A byte of a repeated offer is damaged: it announces half of the embedding."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    lie(s, s.receiver, total_tokens=2)
    return s


def encoder_is_slow() -> Script:
    """One token of four has been produced when the grant arrives."""
    s = Script(total=4, num_blocks=2, ready=1)
    s.handshake()
    s.arrives(Grant)
    s.complete_writes()
    s.arrives_if_sent(Written)
    while s.receiver.checks:
        s.verify(s.receiver)
    return s


def drained_too_early() -> Script:
    """The receiver aborts while a write is in flight."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.abort_receiver()
    s.arrives_if_sent(Drain, Drained)
    s.complete_writes()
    return s


def source_goes_too_early() -> Script:
    """The receiver's abort reaches the sender while a write reads from the embedding."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.abort_receiver()
    s.arrives(Abort)
    s.complete_writes()
    return s


def damaged_on_the_way() -> Script:
    """A byte of a write lands with a flipped bit."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.memory.in_flight[0].flips.add(3)
    s.chunk_arrives()
    return s


def damaged_and_without_a_checksum() -> Script:
    """A byte lands with a flipped bit, and the report has no checksum."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.memory.in_flight[0].flips.add(3)
    s.complete(s.memory.in_flight[0])
    s.loses_its_checksums()
    s.arrives(Written)
    if s.receiver.checks:
        s.verify(s.receiver)
    return s


def writer_outlives_its_link() -> Script:
    """The link breaks, but a write that was in flight still lands."""
    s = Script(total=4, num_blocks=2)
    s.handshake()
    s.arrives(Grant)
    s.redirect(s.receiver, s.receiver.endpoint)
    s.complete_writes()
    return s


def two_senders_answer() -> Script:
    """A sender's offer is late: its successor's offer, to a copy of the same ``Open``, arrived first."""
    s = Script(total=4, num_blocks=2)
    s.network.duplicate(s.where(Open)[0])
    s.arrives(Open)
    s.keep_copy(Offer)
    s.loses(Offer)
    s.start_encoder(ROOM, s.encoder.content).produce(4)
    s.handshake()
    s.copy_arrives()
    return s


def offer_of_a_dead_sender() -> Script:
    """A copy of a dead sender's offer arrives while the receiver opens the successor."""
    s = Script(total=4, num_blocks=2)
    s.arrives(Open)
    s.keep_copy(Offer)
    s.arrives(Offer)
    s.start_encoder(ROOM, s.encoder.content).produce(4)
    s.redirect(s.receiver, s.receiver.endpoint)
    s.copy_arrives()
    return s


SCENARIOS = {
    "meant_for_this_session": (late_grant_meets_a_new_sender,),
    "may_take_up": (late_grant_below_the_floor, grant_after_its_drain),
    "is_new": (repeated_grant,),
    "still_needed": (grant_that_was_overtaken,),
    "is_ready": (encoder_is_slow,),
    "may_report_drained": (drained_too_early,),
    "may_release_source": (source_goes_too_early,),
    "from_current_peer": (two_senders_answer,),
    "answers_current_generation": (offer_of_a_dead_sender,),
    "epoch_is_current": (report_from_before_the_loss,),
    "is_first_report": (repeated_report,),
    "may_count": (damaged_on_the_way,),
    "has_checksum": (damaged_and_without_a_checksum,),
    "is_the_writer": (successor_is_asked_to_drain,),
    "may_release": (writer_outlives_its_link,),
    "content_is_known": (successor_has_not_said_what_it_has,),
    "same_announcement": (offer_changes_its_length,),
    "same_content": (
        successor_has_another_embedding,
        kept_tokens_are_of_another_embedding,
        kept_tokens_are_of_an_earlier_peer,
    ),
}
"""By guard: the scenarios that break an invariant without it."""
