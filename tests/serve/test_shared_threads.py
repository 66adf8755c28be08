"""Threads that clients share: turns, work that leaves with its client, and work that is told to stop."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial

import pytest

from embferry.serve.off_loop import PIECE_BYTES, decode_base64
from embferry.serve.shared_threads import SharedThreads, UnwantedError, acting_for, stop_if_unwanted
from tests.serve.blocking import DEADLINE, Blocking


@pytest.fixture
def blocking() -> Iterator[Blocking]:
    """A function that blocks, until the test has ended at the latest."""
    made = Blocking(lambda: None)
    yield made
    made.release.set()


def busy(count: int, blocking: Blocking, client: str = "first") -> SharedThreads:
    """Returns threads that all do work of one client."""
    threads = SharedThreads(count, "test")
    for _ in range(count):
        threads.submit(client, blocking)
    while blocking.calls < count:
        blocking.called.wait(0.001)
    return threads


def test_a_client_waits_for_one_piece_of_each_other_client_however_many_they_have_sent(blocking: Blocking) -> None:
    threads, order = busy(1, blocking), list[str]()
    sent = [threads.submit(client, partial(order.append, client)) for client in "aaaaaaaabbbbcaa"]
    blocking.release.set()
    for work in sent:
        work.result(DEADLINE)
    assert "".join(order) == "abcabababaaaaaa"


def test_work_that_has_begun_counts_for_its_client_also_when_the_client_has_left() -> None:
    """A client that leaves again and again does not get the threads of a client that stays."""
    leaver, stayer = Blocking(lambda: None), Blocking(lambda: None)
    threads, order = SharedThreads(2, "test"), list[str]()
    left = threads.submit("leaver", leaver)
    staying = threads.submit("stayer", stayer)
    while not (leaver.calls and stayer.calls):
        leaver.called.wait(0.001)
    left.cancel()
    again = threads.submit("leaver", partial(order.append, "leaver"))
    other = threads.submit("stayer", partial(order.append, "stayer"))
    stayer.release.set()
    for work in (staying, other, again):
        work.result(DEADLINE)
    leaver.release.set()
    assert order == ["stayer", "leaver"]


def test_a_client_has_no_more_threads_than_it_may_have_and_goes_on_when_one_is_free(blocking: Blocking) -> None:
    threads = SharedThreads(3, "test", most=2)
    first = [threads.submit("first", blocking) for _ in range(5)]
    while blocking.calls < 2:
        blocking.called.wait(0.001)
    for _ in range(5):
        threads.submit("second", lambda: None).result(DEADLINE)
    assert (blocking.calls, threads.waiting) == (2, 3)
    blocking.release.set()
    for work in first:
        work.result(DEADLINE)


def test_a_client_that_comes_finds_a_free_thread_where_some_are_spared() -> None:
    """The first client has three of five and the second one; the third begins at once."""
    threads, blocking = SharedThreads(5, "test", spares=True), {client: Blocking(lambda: None) for client in "abc"}
    sent = [threads.submit(client, blocking[client]) for client in "aaaaaaaaaa"]
    while blocking["a"].calls < 3:
        blocking["a"].called.wait(0.001)
    for client in "bc":
        sent += [threads.submit(client, blocking[client]) for _ in range(2)]
        assert blocking[client].called.wait(DEADLINE)
    assert [blocking[client].calls for client in "abc"] == [3, 1, 1]
    assert threads.waiting == 7 + 1 + 1
    for client in "cba":  # those that wait go on when others end
        blocking[client].release.set()
    for work in sent:
        work.result(DEADLINE)


def test_cancelled_work_leaves_its_queue_at_once_with_all_that_it_holds(blocking: Blocking) -> None:
    class Body:
        def read(self) -> None:
            raise AssertionError("it was cancelled")

    threads, body = busy(1, blocking), Body()
    gone = weakref.ref(body)
    work = threads.submit("second", body.read)
    del body
    assert work.cancel()
    assert threads.waiting == 0
    assert gone() is None


@pytest.mark.asyncio
async def test_work_goes_with_the_task_that_waits_for_it(blocking: Blocking) -> None:
    threads = busy(1, blocking)
    with acting_for("second"):
        task = asyncio.create_task(threads.run(lambda: None))
    while not threads.waiting:
        await asyncio.sleep(0)
    assert list(threads._waiting) == ["second"]
    task.cancel()
    await asyncio.wait({task})
    assert threads.waiting == 0


def test_work_that_has_begun_is_told_to_stop() -> None:
    threads, begun, cancelled = SharedThreads(1, "test"), threading.Event(), threading.Event()

    def decode() -> bytes:
        begun.set()
        assert cancelled.wait(DEADLINE)
        return decode_base64("A" * PIECE_BYTES)

    work = threads.submit("", decode)
    assert begun.wait(DEADLINE)
    assert not work.cancel()
    cancelled.set()
    with pytest.raises(UnwantedError):
        work.result(DEADLINE)
    assert threads.submit("", lambda: decode_base64("QUJD")).result(DEADLINE) == b"ABC", "the next work goes on"


def test_errors_are_the_callers_and_a_thread_goes_on() -> None:
    threads = SharedThreads(1, "test")
    for kind in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(kind):
            threads.submit("", partial(_raise, kind)).result(DEADLINE)
    assert threads.submit("", stop_if_unwanted).result(DEADLINE) is None


def test_work_that_has_not_begun_is_cancelled_at_the_end(blocking: Blocking) -> None:
    threads = busy(1, blocking)
    waiting = threads.submit("second", lambda: None)
    threads.close()
    for work in (waiting, threads.submit("second", lambda: None)):
        with pytest.raises(CancelledError):
            work.result(DEADLINE)


def _raise(kind: type[BaseException]) -> None:
    raise kind
