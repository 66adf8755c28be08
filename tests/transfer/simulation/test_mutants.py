"""Every guard of the driver is needed: without it, one of the fixed stories breaks an invariant."""

from __future__ import annotations

from itertools import chain

import pytest

from .found import FOUND, told_again
from .mutants import MUTANTS
from .simulation import failure
from .story import draw
from .test_simulation import STORIES

CAUGHT_BY: dict[str, int | str] = {
    "messages_of_the_last_receiver_of_a_room_count": "a_late_end_of_the_last_receiver_ends_a_room_that_is_opened_again",
    "transports_are_never_closed_again": "a_transport_that_could_not_be_closed_is_closed_again",
    "exceptions_pass_the_guard_of_callbacks": 0,
    "exceptions_pass_the_guard_of_device_sink": 73,
    "exceptions_pass_the_guard_of_receive_manager": 20,
    "exceptions_pass_the_guard_of_writer": 9,
    "parked_requests_do_not_expire": 34,
    "nothing_is_due_for_parked_requests": 43,
    "blocks_of_another_transfer_of_the_room_are_freed": 200,
    "success_before_the_sink_is_complete": 103,
    "timers_do_not_expire": 8,
    "tokens_count_before_the_sink_has_them": "tokens_count_before_the_sink_has_them",
    "checksums_of_device_memory_are_not_taken": "checksums_of_device_memory_are_not_taken",
    "checksums_of_transfers_that_have_failed_are_kept": 0,
    "a_source_that_cannot_be_read_fails_nothing": 1,
    "abort_of_a_record_does_nothing_at_close": 12,
    "revoked_is_not_reported_for_a_lost_transport": 118,
    "nothing_is_committed": 246,
    "a_broken_record_is_driven_on": 9,
    "parked_requests_have_no_bound": 38,
    "every_session_that_writes_to_a_room_is_kept": 4,
    "the_control_plane_may_not_raise": 15,
    "broken_records_answer_each_other": 283,
    "transports_are_lost_by_the_failure_of_one_peer": 44,
    "a_lost_transport_fails_what_is_admitted_to_it": "a_lost_transport_fails_what_is_admitted_to_it",
    "writes_do_not_end_if_close_raises": "writes_do_not_end_if_close_raises",
    "a_broken_sender_releases_its_source_at_once": "a_broken_sender_releases_its_source_at_once",
    "a_broken_record_of_a_sender_is_not_torn_down": 8,
    "blocks_that_a_broken_transport_may_write_are_released": "a_transport_cannot_be_closed_at_both_ends",
}
"""Seed or name of the story that caught a mutant when it was last looked for. It is told first, which saves minutes."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_story_breaks_without_the_guard(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    hint = CAUGHT_BY.get(name)
    known = [] if hint is None else [FOUND[hint] if isinstance(hint, str) else draw(hint)]
    found = chain.from_iterable(map(told_again, FOUND.values()))
    stories = chain(known, found, map(draw, range(STORIES)))
    assert any(failure(story) is not None for story in stories)
