"""Stories, as small as they were found, that showed a fault of the driver or that need one of its guards.

Each is told with several seeds, because a change of the driver moves everything that happens at random.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .story import Story

SEEDS = 20

FOUND: dict[str, Story] = {
    "a_lost_transport_fails_what_is_admitted_to_it": Story(
        364,
        27,
        (
            (0.0, "break_transport", 29, 31, 39),
            (0.0, "begin", 17, 32, 56),
            (0.1486, "break_transport", 38, 36, 15),
            (0.2511, "begin", 41, 33, 58),
            (0.3281, "begin", 52, 16, 38),
        ),
    ),
    "checksums_of_device_memory_are_not_taken": Story(
        5,
        61,
        (
            (0.0162, "begin", 12, 23, 54),
            (0.0192, "begin", 29, 54, 24),
            (0.0057, "redirect", 36, 19, 17),
            (0.0, "other_end", 63, 10, 57),
            (0.0186, "pause", 37, 1, 14),
            (0.0, "redirect", 51, 59, 44),
            (0.0063, "break_make", 28, 29, 36),
            (0.018, "redirect", 57, 59, 22),
            (0.0741, "other_end", 31, 36, 38),
        ),
    ),
    "tokens_count_before_the_sink_has_them": Story(
        4,
        41,
        (
            (0.3423, "begin", 28, 22, 62),
            (1.088, "begin", 62, 13, 56),
            (2.304, "begin", 32, 41, 60),
            (0.0015, "begin", 5, 51, 9),
            (0.0053, "begin", 6, 4, 40),
            (0.0152, "begin", 2, 63, 49),
            (0.0, "produce", 14, 52, 57),
            (0.0061, "redirect", 21, 11, 40),
            (0.0, "produce", 4, 16, 51),
            (0.1323, "other_end", 53, 30, 44),
            (0.0123, "begin", 38, 15, 18),
            (0.0, "begin", 41, 59, 37),
            (0.0192, "weather", 7, 3, 5),
            (0.3683, "begin", 44, 59, 61),
            (0.1807, "begin", 56, 23, 37),
            (0.0117, "break_sink", 63, 62, 21),
            (0.0, "read", 24, 24, 50),
        ),
    ),
    "chunks_that_staging_has_not_copied_never_end": Story(
        3203,
        5,
        (
            (0.403, "begin", 29, 43, 17),
            (0.0, "begin", 47, 55, 53),
            (0.0079, "begin", 60, 14, 42),
            (0.0001, "other_end", 28, 25, 44),
            (0.0044, "break_sink", 39, 58, 35),
            (0.0, "replace", 42, 0, 6),
            (0.1128, "weather", 12, 35, 18),
            (0.0016, "break_source", 41, 44, 48),
            (0.0179, "break_source", 24, 20, 12),
            (0.1591, "break_machine", 46, 27, 60),
            (0.3849, "break_sink", 12, 46, 30),
            (0.0, "break_make", 51, 20, 62),
            (0.3877, "read", 29, 1, 53),
            (0.353, "break_sink", 43, 54, 55),
            (0.2675, "produce", 36, 61, 51),
            (0.0, "wait", 59, 60, 1),
            (0.2991, "break_machine", 8, 44, 44),
            (0.3733, "lie", 46, 7, 44),
            (0.0088, "replace", 14, 14, 32),
        ),
    ),
    "a_broken_record_waits_for_chunks_that_no_sink_has": Story(
        551,
        50,
        (
            (0.0, "begin", 54, 24, 24),
            (0.0065, "begin", 54, 56, 1),
            (0.0132, "break_machine", 35, 21, 18),
        ),
    ),
    "a_transport_is_lost_at_both_ends": Story(
        1917,
        14,
        (
            (0.0029, "begin", 52, 44, 63),
            (0.1939, "begin", 48, 32, 50),
            (0.0159, "break_transport", 41, 44, 48),
            (0.02, "break_transport", 3, 28, 54),
        ),
    ),
    "a_broken_sender_releases_its_source_at_once": Story(
        769,
        52,
        (
            (0.0126, "begin", 32, 31, 43),
            (0.0182, "begin", 45, 16, 38),
            (0.2064, "consume", 52, 44, 47),
            (0.28, "reopen", 62, 48, 17),
            (0.2466, "reopen", 4, 18, 38),
            (0.0927, "produce", 54, 34, 55),
            (0.009, "produce", 8, 54, 17),
            (0.0, "break_machine", 29, 32, 11),
            (0.0179, "consume", 24, 49, 30),
        ),
    ),
    "writes_do_not_end_if_close_raises": Story(
        541,
        1,
        (
            (0.0093, "break_transport", 46, 17, 5),
            (0.66, "begin", 27, 63, 26),
            (0.0129, "break_transport", 30, 23, 40),
        ),
    ),
    "a_transport_cannot_be_closed_at_both_ends": Story(
        2609,
        38,
        (
            (0.0, "weather", 0, 2, 0),
            (0.2382, "begin", 39, 8, 28),
            (0.1863, "begin", 35, 4, 16),
            (0.0455, "begin", 24, 12, 52),
            (0.3965, "break_transport", 2, 62, 0),
            (0.0317, "break_transport", 0, 40, 0),
        ),
    ),
    "failed_writes_are_reported_before_the_loss_of_their_transport": Story(
        354326,
        29,
        (
            (0.0095, "begin", 36, 56, 56),
            (0.0, "begin", 34, 3, 2),
            (0.0101, "begin", 40, 19, 27),
            (0.0175, "other_end", 52, 14, 4),
            (0.0, "kill_language", 26, 58, 27),
            (0.1067, "noise", 51, 45, 51),
            (0.2515, "redirect", 58, 50, 60),
            (0.0461, "produce", 12, 11, 50),
            (0.1578, "reopen", 37, 61, 9),
            (0.0, "weather", 41, 63, 23),
            (0.0585, "begin", 28, 41, 12),
            (0.0, "weather", 22, 29, 3),
            (0.0083, "break_source", 22, 44, 33),
            (0.0, "redirect", 57, 2, 20),
            (0.0, "pause", 1, 19, 37),
            (1.007, "kill_encode", 12, 30, 1),
            (0.0, "resume", 16, 10, 32),
            (0.012, "break_transport", 27, 5, 25),
        ),
    ),
    "a_late_opening_of_the_last_receiver_takes_a_room_that_is_opened_again": Story(
        349578,
        3,
        (
            (0.0017, "begin", 20, 47, 38),
            (0.1888, "begin", 36, 7, 58),
            (1.496, "begin", 43, 43, 56),
            (0.0, "clear", 47, 45, 58),
            (0.0, "weather", 29, 15, 10),
            (0.0, "begin", 24, 28, 8),
            (0.0, "flood", 1, 42, 13),
            (0.0023, "kill_encode", 17, 16, 7),
            (0.1147, "break_transport", 15, 50, 56),
            (0.2085, "produce", 56, 32, 10),
            (0.0, "reopen", 17, 0, 6),
            (2.408, "clear", 9, 15, 12),
        ),
    ),
    "a_late_end_of_the_last_receiver_ends_a_room_that_is_opened_again": Story(
        309017,
        18,
        (
            (0.4614, "begin", 16, 25, 8),
            (0.0474, "begin", 23, 56, 3),
            (0.0, "cut", 35, 5, 48),
            (0.0, "begin", 39, 55, 41),
            (0.0, "other_end", 23, 63, 3),
            (0.0055, "weather", 29, 2, 32),
            (0.0039, "clear", 53, 18, 3),
            (0.2939, "other_end", 50, 40, 5),
            (0.0, "reopen", 10, 38, 49),
            (0.3589, "break_threads", 36, 46, 15),
        ),
    ),
    "a_transfer_has_not_ended_when_its_manager_is_closed": Story(
        349203,
        43,
        (
            (0.0, "begin", 53, 10, 36),
            (0.4951, "begin", 34, 16, 24),
            (0.0191, "other_end", 42, 16, 25),
            (0.0444, "begin", 37, 41, 15),
            (0.0008, "kill_encode", 43, 30, 52),
            (0.0176, "produce", 57, 46, 18),
            (0.0182, "kill_encode", 3, 30, 30),
            (0.0074, "resume", 5, 43, 17),
            (0.0, "replace", 32, 27, 2),
        ),
    ),
    "a_transport_that_could_not_be_closed_is_closed_again": Story(
        304808,
        28,
        (
            (0.0, "begin", 6, 14, 38),
            (0.0039, "begin", 35, 44, 62),
            (0.0, "break_transport", 33, 40, 54),
            (0.0156, "kill_encode", 46, 9, 49),
        ),
    ),
}
"""By what was wrong, or is without the guard."""


def told_again(story: Story) -> Iterator[Story]:
    """Yields the story with several seeds."""
    yield story
    for seed in range(SEEDS):
        yield replace(story, seed=seed)
