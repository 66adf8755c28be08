"""Lines about weights that take long to load."""

from __future__ import annotations

import logging

import pytest

from embferry.engine.progress import LINE_SECONDS, Progress


def test_a_long_step_is_told_now_and_then_and_a_short_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    now = [0.0]
    progress = Progress("tensors of the text part", 4, lambda: now[0])
    for _ in range(4):
        now[0] += 0.6 * LINE_SECONDS
        progress.step(1_500_000_000)
    assert [record.getMessage() for record in caplog.records] == [
        "loaded 2 of 4 tensors of the text part, 3.0 GB",
        "loaded 4 of 4 tensors of the text part, 6.0 GB",
    ]
    caplog.clear()
    quick = Progress("tensors", 1, lambda: now[0])
    quick.step(1)
    assert caplog.records == []
