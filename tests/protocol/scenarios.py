"""Short scripts through the simulated world, one for each rule that chance finds too slowly.

Each is harmless as long as the rule holds, and breaks an invariant of the world without it.
"""

from __future__ import annotations

from embferry.protocol.messages import Abort, Drain, Drained, Grant, Offer, Open, Progress, Written

from .script import ROOM, Script


def late_grant_meets_a_new_sender() -> Script:
    """A grant that has been carried out arrives once more, at a sender that knows nothing of it."""
    s = Script(total=4, num_blocks=1)
    s.meet()
    s.keep(Grant)
    s.arrives(Grant)
    s.chunk()
    s.use()
    s.replace_encoder()
    s.revoke()  # the block that the lost sender was granted last is free again, and given to the new one
    s.late()
    s.all_land()
    return s


def late_grant_below_the_floor() -> Script:
    """A grant that is closed arrives once more; its block has been granted again."""
    s = Script(total=4, num_blocks=1)
    s.meet()
    s.keep(Grant)
    s.arrives(Grant)
    s.chunk()
    s.use()
    s.lost(Progress)
    s.arrives(Grant)  # the second: it says that the first is closed
    s.complete(s.memory.flights[0])
    s.late()
    s.all_land()
    return s


def grant_after_its_drain() -> Script:
    """A grant arrives after it was drained; its blocks are another room's now."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.keep(Grant)
    s.lost(Grant)
    s.give_up()
    s.lost(Abort)
    s.arrives(Drain, Drained)
    s.another_room()
    s.late()
    s.all_land()
    return s


def repeated_grant() -> Script:
    """A grant that has been carried out in part arrives once more; a block of it is another room's now."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.keep(Grant)
    s.arrives(Grant)
    s.chunk()
    s.use()
    s.lost(Progress)
    s.another_room()
    s.complete(s.memory.flights[0])
    s.late()
    s.all_land()
    return s


def grant_that_was_overtaken() -> Script:
    """The link breaks, the same tokens come under a second grant, then the first one arrives."""
    s = Script(total=4, num_blocks=4)
    s.meet()
    s.keep(Grant)
    s.lost(Grant)
    s.break_link()
    s.arrives(Grant)
    s.chunk()
    s.arrives(Progress)
    s.late()
    return s


def report_from_before_the_loss() -> Script:
    """The link breaks, the same tokens come under a second grant, then the report on the first one arrives."""
    s = Script(total=4, num_blocks=4)
    s.meet()
    s.arrives(Grant)
    s.complete(s.memory.flights[0])
    s.keep(Written)
    s.lost(Written)
    s.break_link()
    s.arrives(Grant)
    s.complete(s.memory.flights[-1])
    s.arrives(Written)
    s.verify(s.receiver)
    s.late()
    while s.receiver.checks:
        s.verify(s.receiver)
    return s


def repeated_report() -> Script:
    """A report arrives once more; the block it names is free."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.complete(s.memory.flights[0])
    s.keep(Written)
    s.arrives(Written)
    s.verify(s.receiver)
    s.use()
    s.late()
    return s


def successor_is_asked_to_drain() -> Script:
    """A writer dies; its successor knows of no write, and would say so if it were asked."""
    s = Script(total=4, num_blocks=4)
    s.meet()
    s.arrives(Grant)
    s.replace_encoder()
    s.tick(0.1)
    s.arrives_if_sent(Drain, Drained)
    s.all_land()
    return s


def successor_has_not_said_what_it_has() -> Script:
    """The new sender has another embedding of the same length, but its announcement is lost."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.chunk()
    s.use()
    s.replace_encoder(2, ready=False)
    s.lost(Grant)
    s.run()
    s.tick(0.1)
    s.encoder.produce(4)
    s.run()
    s.lost(Offer)
    s.lost(Open)
    s.arrives_if_sent(Grant)
    if s.memory.flights[1:]:
        s.complete(s.memory.flights[-1])
        s.arrives(Written)
        s.verify(s.receiver)
    return s


def successor_has_another_embedding() -> Script:
    s = Script(total=4, num_blocks=4)
    s.meet()
    s.arrives(Grant)
    s.chunk()
    s.replace_encoder(2)
    s.arrives(Grant)
    s.complete(s.memory.flights[-1])
    s.arrives(Written)
    s.verify(s.receiver)
    s.use()
    return s


def encoder_is_slow() -> Script:
    """One token of four has been produced."""
    s = Script(total=4, num_blocks=2, ready=1)
    s.meet()
    s.arrives(Grant)
    s.all_land()
    s.arrives_if_sent(Written)
    while s.receiver.checks:
        s.verify(s.receiver)
    return s


def drained_too_early() -> Script:
    """The receiver gives up while a write is on its way."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.give_up()
    s.arrives_if_sent(Drain, Drained)
    s.all_land()
    return s


def source_goes_too_early() -> Script:
    """The sender learns that the receiver has given up while a write reads from the embedding."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.give_up()
    s.arrives(Abort)
    s.all_land()
    return s


def damaged_on_the_way() -> Script:
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.memory.flights[0].flips.add(3)
    s.chunk()
    return s


def damaged_and_without_a_checksum() -> Script:
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.memory.flights[0].flips.add(3)
    s.complete(s.memory.flights[0])
    s.loses_its_checksums()
    s.arrives(Written)
    if s.receiver.checks:
        s.verify(s.receiver)
    return s


def writer_outlives_its_link() -> Script:
    """The connection breaks; what the writer had started still lands."""
    s = Script(total=4, num_blocks=2)
    s.meet()
    s.arrives(Grant)
    s.redirect(s.receiver, s.receiver.endpoint)
    s.all_land()
    return s


def two_senders_answer() -> Script:
    """A sender's offer is late; its successor's, to a copy of the same opening, came first."""
    s = Script(total=4, num_blocks=2)
    s.network.duplicate(s.where(Open)[0])
    s.arrives(Open)
    s.keep(Offer)
    s.lost(Offer)
    s.start_encoder(ROOM, s.encoder.content).produce(4)
    s.meet()
    s.late()
    return s


def offer_of_a_dead_sender() -> Script:
    """A copy of a sender's offer arrives when it is dead, and its successor is being asked."""
    s = Script(total=4, num_blocks=2)
    s.arrives(Open)
    s.keep(Offer)
    s.arrives(Offer)
    s.start_encoder(ROOM, s.encoder.content).produce(4)
    s.redirect(s.receiver, s.receiver.endpoint)
    s.late()
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
    "same_content": (successor_has_another_embedding,),
}
"""By the guard without which they go wrong."""
