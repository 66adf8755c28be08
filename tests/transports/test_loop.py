"""The event loop: scopes that fail alone, wake-ups, timers, forked children."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from embferry.transports.net.loop import READ, WRITE, Loop, LoopThread


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_NONBLOCK)
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, asyncio.CancelledError, SystemExit])
def test_a_failing_callback_ends_its_scope_only(loop: Loop, pipe: tuple[int, int], error: type[BaseException]) -> None:
    failures: list[BaseException] = []
    seen: list[str] = []
    faulty, sound = loop.scope(failures.append), loop.scope(failures.append)

    def fail(_: int) -> None:
        raise error

    faulty.watch(pipe[1], WRITE, fail)
    faulty.later(0, lambda: seen.append("a timer of the ended scope"))
    sound.later(0, lambda: seen.append("sound"))
    loop.run_once(0)
    assert [type(failure) for failure in failures] == [error]
    faulty.call(lambda: seen.append("a call"))
    faulty.watch(pipe[1], WRITE, lambda _: seen.append("watched again"))
    faulty.later(0, lambda: seen.append("a later timer"))
    while len(seen) < 2:
        loop.run_once(1)
    loop.run_once(0)
    assert sorted(seen) == ["a call", "sound"]


@pytest.mark.parametrize("place", ["call", "later", "before_wait"])
def test_a_failing_callback_of_the_loop_itself_changes_nothing_else(loop: Loop, place: str) -> None:
    def fail() -> None:
        raise RuntimeError

    {"call": loop.call, "later": lambda f: loop.later(0, f), "before_wait": loop.before_wait}[place](fail)
    seen: list[int] = []
    loop.later(0, lambda: seen.append(1))
    while not seen:
        loop.run_once(0)


def test_a_descriptor_whose_callback_failed_is_not_watched_on(loop: Loop, pipe: tuple[int, int]) -> None:
    calls: list[int] = []

    def fail(events: int) -> None:
        calls.append(events)
        raise RuntimeError

    loop.watch(pipe[1], WRITE, fail)
    for _ in range(3):
        loop.run_once(0)
    assert calls == [WRITE]


def test_a_failure_that_cannot_be_reported_is_survived(loop: Loop) -> None:
    def report(error: BaseException) -> None:
        raise RuntimeError

    scope = loop.scope(report)
    scope.call(lambda: [][1])
    loop.run_once(0)
    loop.run_once(0)


def test_an_ended_scope_leaves_others_watched(loop: Loop, pipe: tuple[int, int]) -> None:
    one, two = loop.scope(lambda error: None), loop.scope(lambda error: None)
    seen: list[str] = []
    one.watch(pipe[0], READ, lambda _: seen.append("one"))
    two.watch(pipe[1], WRITE, lambda _: seen.append("two"))
    one.end()
    one.end()
    os.write(pipe[1], b"x")
    loop.run_once(0)
    assert seen == ["two"]


def test_a_wake_before_or_during_the_wait_ends_it(loop: Loop) -> None:
    loop.wake()
    loop.run_once(None)
    for _ in range(200):
        thread = threading.Thread(target=loop.wake)
        thread.start()
        loop.run_once(None)  # would hang for good if the wake-up were lost
        thread.join()


def test_calls_of_many_threads_all_run(loop: Loop) -> None:
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda: [loop.call(lambda: done.append(1)) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(done) < 2000:
        loop.run_once(None)
    for thread in threads:
        thread.join()


def test_a_closed_loop_runs_calls_at_once_and_ignores_the_rest(pipe: tuple[int, int]) -> None:
    loop, seen = Loop(), list[str]()
    loop.watch(pipe[0], READ, lambda _: None)
    loop.call(lambda: seen.append("before"))
    loop.close()
    loop.close()
    reused = os.open("/dev/null", os.O_RDONLY)
    loop.wake()
    loop.call(lambda: seen.append("after"))
    loop.unwatch(pipe[0])
    loop.watch(pipe[0], READ, lambda _: None)
    loop.later(0, lambda: None)
    os.close(reused)
    assert seen == ["before", "after"]


def test_a_timer_that_sets_itself_again_does_not_keep_others_from_their_turn(loop: Loop) -> None:
    seen: list[int] = []

    def again() -> None:
        loop.later(0, again)

    again()
    loop.later(0, lambda: seen.append(1))
    while not seen:
        loop.run_once(1)


def test_what_runs_before_the_wait_may_make_calls_and_be_removed(loop: Loop) -> None:
    seen: list[str] = []
    remove = loop.before_wait(lambda: loop.call(lambda: seen.append("called")))
    loop.run_once(None)
    remove()
    remove()
    loop.run_once(0)
    assert seen == ["called"]


def test_a_closed_and_reused_descriptor_can_be_watched(loop: Loop) -> None:
    seen: list[int] = []
    first = os.pipe()
    loop.watch(first[0], READ, lambda _: seen.append(1))
    os.close(first[0])  # without unwatch
    second = os.pipe()
    assert second[0] == first[0]
    loop.watch(second[0], READ | WRITE, lambda _: seen.append(2))
    os.write(second[1], b"x")
    loop.run_once(0)
    for fd in (first[1], *second):
        os.close(fd)
    assert seen == [2]


def test_a_failed_loop_thread_still_runs_calls_until_it_is_closed() -> None:
    failed, ran = threading.Event(), threading.Event()
    thread = LoopThread("embferry-test", lambda error: failed.set())
    thread.call(lambda: [][1])
    assert failed.wait(60)
    thread.call(ran.set)
    assert ran.wait(60)
    thread.close()
    assert not thread._thread.is_alive()


@pytest.mark.integration
def test_a_forked_child_that_closes_its_copies_does_not_disturb_the_parent() -> None:
    program = """
import os, time
from embferry.transports.net.loop import READ, Loop, LoopThread
from embferry.transports.tcp import TcpTransport

loop, seen = Loop(), []
reader, writer = os.pipe()
loop.watch(reader, READ, lambda _: seen.append(os.read(reader, 1)))
thread = LoopThread("t", print)
thread.call(lambda: None)
child = os.fork()
if child == 0:
    ran = []
    loop.call(lambda: ran.append(1))  # runs at once: no thread will
    loop.unwatch(reader)
    os.close(reader)
    loop.wake()
    loop.close()
    thread.close()
    os._exit(0 if ran and loop.forked else 1)
assert os.waitpid(child, 0)[1] == 0
os.write(writer, b"x")
while not seen:
    loop.run_once(None)
thread.close()
loop.close()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)


def test_time_outs_follow_the_clock_of_the_loop(loop: Loop) -> None:
    assert abs(loop.now() - time.monotonic()) < 60
    assert loop.scope(lambda error: None).now() >= loop.now() - 60
