"""Every rule that keeps data safe, one function each.

The machines call these functions; they have no state. For each, ``tests/protocol/test_mutants.py`` removes the rule and
shows that the property suite then finds lost, foreign or doubled bytes. A rule without such a mutant fails the tests.
"""

from __future__ import annotations

from collections.abc import Container

from .ranges import RangeSet

# Sender: what may be written


def meant_for_this_session(target: int, session: int) -> bool:
    """A message to an earlier incarnation of this end is dropped: its grants may have been revoked long ago."""
    return target == session


def may_take_up(epoch: int, floor: int, refused: Container[int]) -> bool:
    """A grant that was drained before it arrived, or lies below the receiver's floor, is never written."""
    return epoch >= floor and epoch not in refused


def is_new(epoch: int, known: Container[int]) -> bool:
    """A repeated grant is answered, not written again: its blocks may belong to another transfer by now."""
    return epoch not in known


def still_needed(start: int, stop: int, granted_again: int, until: int) -> bool:
    """Tokens that were granted again under a later epoch are not written under the earlier one: it is being revoked.

    A receiver grants no token of an open grant that has not been reported. It follows from the grants alone, not from
    acknowledgements, which may be late and concern the content of another sender.
    """
    return stop <= granted_again or until <= start


def is_ready(stop: int, ready_tokens: int) -> bool:
    """Only tokens that the encoder has produced are written."""
    return stop <= ready_tokens


def may_report_drained(writes_in_flight: int) -> bool:
    """``drained`` promises that no write is in flight."""
    return writes_in_flight == 0


def may_release_source(writes_in_flight: int) -> bool:
    """The embedding's memory is kept while a write reads from it."""
    return writes_in_flight == 0


# Receiver: what counts, and what may return to the pool


def from_current_peer(source: int, peer: int) -> bool:
    """Only messages from the session whose offer was accepted count."""
    return source == peer


def answers_current_generation(generation: int, current: int) -> bool:
    """An offer or a refusal of an earlier generation may come from a sender that no longer exists."""
    return generation == current


def epoch_is_current(draining: bool) -> bool:
    """A report under an epoch that is being drained is dropped: its tokens are requested under another epoch."""
    return not draining


def is_first_report(open_tokens: RangeSet, start: int, stop: int) -> bool:
    """A chunk is taken once: a repeated report must not touch blocks that have returned to the pool."""
    return open_tokens.covers(start, stop)


def may_count(checksum_matches: bool) -> bool:
    """Only verified tokens count as transferred."""
    return checksum_matches


def has_checksum(checksum: bytes | None, wanted: bool) -> bool:
    """A receiver that verifies rejects chunks without a checksum."""
    return checksum is not None or not wanted


def is_the_writer(source: int, writer: int) -> bool:
    """Only the session that was granted the blocks knows whether a write to them is in flight."""
    return source == writer


def may_release(drained: bool, revoked: bool) -> bool:
    """Quarantine: blocks return to the pool only when their writer is done with them or has lost its access."""
    return drained or revoked


def content_is_known(offered: bool) -> bool:
    """Nothing is requested or taken from a sender before it has said what it has: its content may differ."""
    return offered


def same_announcement(before: object, now: object) -> bool:
    """A session announces one embedding. A length, digest or aux that differs from its last one is damaged or a lie."""
    return before is None or before == now


def same_content(before: bytes | None, now: bytes) -> bool:
    """A transfer continues with another sender only if the content is the same."""
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
    answers_current_generation,
    epoch_is_current,
    is_first_report,
    may_count,
    has_checksum,
    is_the_writer,
    may_release,
    content_is_known,
    same_announcement,
    same_content,
)
