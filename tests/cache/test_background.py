"""Bounded work in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator

import pytest

from embferry.cache.background import Background

GUARD_S = 60.0


class Blocker:
    """A job that hangs until it is opened."""

    def __init__(self) -> None:
        self.began, self.opened = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.began.set()
        assert self.opened.wait(GUARD_S)


@pytest.fixture
def blocker() -> Iterator[Blocker]:
    made = Blocker()
    yield made
    made.opened.set()


def test_a_full_queue_refuses_by_number(blocker: Blocker) -> None:
    background = Background("test", 1, 2, 1 << 30)
    assert background.put(blocker)
    assert blocker.began.wait(GUARD_S)
    assert [background.put(int) for _ in range(3)] == [True, True, False]
    blocker.opened.set()
    assert background.close(GUARD_S)


def test_a_full_queue_refuses_by_bytes_but_takes_one_of_any_size(blocker: Blocker) -> None:
    background = Background("test", 1, 10, 100)
    assert background.put(blocker)
    assert blocker.began.wait(GUARD_S)
    assert [background.put(int, nbytes) for nbytes in (1000, 1)] == [True, False]
    blocker.opened.set()
    assert background.close(GUARD_S)


def test_the_queue_is_done_before_it_ends(blocker: Blocker) -> None:
    background, done = Background("test", 2, 100, 100), []
    background.put(blocker)
    for number in range(50):
        background.put(lambda number=number: done.append(number))
    blocker.opened.set()
    assert background.close(GUARD_S)
    assert sorted(done) == list(range(50))
    assert not background.put(int)


def test_a_job_that_hangs_keeps_nothing_alive(blocker: Blocker) -> None:
    background = Background("test", 1, 10, 100)
    background.put(blocker)
    assert blocker.began.wait(GUARD_S)
    done: list[int] = []
    background.put(lambda: done.append(1))
    assert not background.close(0.0)
    blocker.opened.set()
    assert background.close(GUARD_S)
    assert done == []  # it was dropped


def test_it_is_stalled_when_every_thread_is(blocker: Blocker) -> None:
    now = [0.0]
    background, other = Background("test", 2, 10, 100, clock=lambda: now[0]), Blocker()
    for each in (blocker, other):
        background.put(each)
        assert each.began.wait(GUARD_S)
    assert not background.is_stalled(1.0)
    now[0] = 2.0
    assert background.is_stalled(1.0)
    other.opened.set()
    done = threading.Event()
    background.put(done.set)
    assert done.wait(GUARD_S)
    assert not background.is_stalled(1.0)
    blocker.opened.set()
    assert background.close(GUARD_S)


def test_a_job_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    background, done = Background("test", 1, 10, 100), threading.Event()
    with caplog.at_level(logging.ERROR):
        background.put(lambda: 1 / 0)
        background.put(done.set)
        assert done.wait(GUARD_S)
    assert "ZeroDivisionError" in caplog.text
    assert background.close(GUARD_S)
