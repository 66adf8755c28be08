"""Every rule that keeps data safe, one function each.

The machines ask; nothing here has state. For each of these, ``tests/protocol/test_mutants.py`` takes the rule out and
shows that the property suite then finds lost, foreign or doubled bytes. A rule without such a mutant fails the tests.
"""

from __future__ import annotations

from collections.abc import Container

from .ranges import RangeSet

# Sender: what may be written


def meant_for_this_session(target: int, session: int) -> bool:
    """A message to an earlier incarnation of this end is dropped: its grants may long be revoked."""
    return target == session


def may_take_up(epoch: int, floor: int, refused: Container[int]) -> bool:
    """A grant that was drained before it arrived, or lies below the receiver's floor, must never be written."""
    return epoch >= floor and epoch not in refused


def is_new(epoch: int, known: Container[int]) -> bool:
    """A repeated grant is answered, not written again: its blocks may belong to someone else by now."""
    return epoch not in known


def still_needed(next_token: int, acknowledged: int) -> bool:
    """What is acknowledged is never sent again. A grant whose next token has come another way is being taken back."""
    return next_token >= acknowledged


def is_ready(stop: int, ready_tokens: int) -> bool:
    """Only what the encoder has produced is written."""
    return stop <= ready_tokens


def may_report_drained(writes_in_flight: int) -> bool:
    """'Drained' promises that no write is on its way."""
    return writes_in_flight == 0


def may_release_source(writes_in_flight: int) -> bool:
    """The embedding's memory stays while a write reads from it."""
    return writes_in_flight == 0


# Receiver: what counts, and what may be given back


def from_current_peer(source: int, peer: int) -> bool:
    """Only the session whose offer was taken up is listened to."""
    return source == peer


def answers_latest_opening(opening: int, latest: int) -> bool:
    """An offer, or a refusal, that answers an earlier opening may come from a sender that is no more."""
    return opening == latest


def epoch_is_current(draining: bool) -> bool:
    """What belongs to an epoch that is being drained is dropped: its tokens are asked for under another."""
    return not draining


def is_first_report(open_tokens: RangeSet, start: int, stop: int) -> bool:
    """A chunk is taken once: a repeated report must not touch blocks that have been given back."""
    return open_tokens.covers(start, stop)


def may_count(checksum_matches: bool) -> bool:
    """Only verified tokens count as transferred."""
    return checksum_matches


def has_checksum(checksum: bytes | None, wanted: bool) -> bool:
    """Who wants checksums takes no chunk without one."""
    return checksum is not None or not wanted


def is_the_writer(source: int, writer: int) -> bool:
    """Only who was given the blocks can say that no write to them is on its way; another peer cannot know."""
    return source == writer


def may_release(drained: bool, revoked: bool) -> bool:
    """Quarantine: blocks a writer has access to come back only when it is done with them or has lost that access."""
    return drained or revoked


def content_is_known(offered: bool) -> bool:
    """Nothing is asked of a sender, or taken from it, beyond what it has said it has: its content may be another."""
    return offered


def same_content(before: bytes | None, now: bytes) -> bool:
    """A transfer goes on with another sender only if the content is the same."""
    return before is None or before == now


GUARDS = (
    meant_for_this_session,
    may_take_up,
    is_new,
    still_needed,
    is_ready,
    may_report_drained,
    may_release_source,
    from_current_peer,
    answers_latest_opening,
    epoch_is_current,
    is_first_report,
    may_count,
    has_checksum,
    is_the_writer,
    may_release,
    content_is_known,
    same_content,
)
