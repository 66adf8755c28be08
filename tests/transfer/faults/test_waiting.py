"""Waits from any thread and loop, cancelled, timed out and repeated; nothing of a wait outlives it."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from embferry import EmbeddingReceiver, transferred, wait
from embferry.protocol.errors import Aborted, LeaseExpired, LocalProtocolError
from embferry.protocol.states import KVPoll

from ..conftest import SECONDS, Pair, embedding, same

ROWS = embedding(40)


@pytest.fixture
def receiver(pair: Pair) -> EmbeddingReceiver:
    """Returns a receiver that waits for its sender."""
    receiver = pair.receiver(7)
    receiver.init()
    return receiver


def nothing_waits(receiver: EmbeddingReceiver) -> bool:
    return not receiver._notifier._waiters and not receiver._notifier._callbacks


def finish(pair: Pair, receiver: EmbeddingReceiver) -> None:
    pair.sender(7, ROWS)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), ROWS)
    assert nothing_waits(receiver)


def timed_out(receiver: EmbeddingReceiver) -> None:
    async def one() -> None:
        async with asyncio.timeout(0.01):
            await transferred(receiver)

    with pytest.raises(TimeoutError):
        asyncio.run(one())


def cancelled(receiver: EmbeddingReceiver) -> None:
    async def one() -> None:
        task = asyncio.create_task(transferred(receiver))
        await asyncio.sleep(0)
        assert not nothing_waits(receiver)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(one())


def out_of_time(receiver: EmbeddingReceiver) -> None:
    with pytest.raises(LeaseExpired, match="still going on"):
        wait(receiver, 0.01)


def abandoned(receiver: EmbeddingReceiver) -> None:
    """The loop is closed while a task of it waits."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(transferred(receiver))
    loop.run_until_complete(asyncio.sleep(0))
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine = task.get_coro()
    loop.close()
    receiver.notify()
    assert nothing_waits(receiver)  # its waker raised, and was dropped
    assert coroutine is not None
    coroutine.close()


@pytest.mark.parametrize("timeout", [0, -1, -1e300, 1e-9, np.float32(0), np.array(0.0)], ids=str)
def test_a_wait_without_time_says_how_it_stands_at_once(
    pair: Pair, receiver: EmbeddingReceiver, timeout: float
) -> None:
    with pytest.raises(LeaseExpired, match="still going on"):
        wait(receiver, timeout)
    finish(pair, receiver)
    wait(receiver, timeout)


@pytest.mark.parametrize("timeout", [math.inf, 1e300, 10**18, threading.TIMEOUT_MAX])
def test_a_wait_without_a_limit_ends_with_the_transfer(pair: Pair, receiver: EmbeddingReceiver, timeout: float) -> None:
    waiting = threading.Event()
    begin = receiver.wake_on_change

    def begun(wake: Callable[[], object]) -> Callable[[], object]:
        waiting.set()
        return begin(wake)

    receiver.wake_on_change = begun  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(wait, receiver, timeout)
        assert waiting.wait(SECONDS)
        pair.sender(7, ROWS)
        ended.result(SECONDS)
    assert same(receiver.arrays(), ROWS)
    assert nothing_waits(receiver)


@pytest.mark.parametrize("timeout", [math.nan, -math.inf, "1", None, True, [], 10**400, np.array([1.0, 2.0])], ids=str)
def test_a_wait_for_no_number_is_refused(pair: Pair, receiver: EmbeddingReceiver, timeout: Any) -> None:
    with pytest.raises(LocalProtocolError, match="timeout"):
        wait(receiver, timeout)
    finish(pair, receiver)


@pytest.mark.parametrize("given_up", [timed_out, cancelled, out_of_time, abandoned])
def test_a_wait_that_is_given_up_harms_nothing_and_can_be_repeated(
    pair: Pair, receiver: EmbeddingReceiver, given_up: Callable[[EmbeddingReceiver], None]
) -> None:
    for _ in range(3):
        given_up(receiver)
        assert nothing_waits(receiver)
    finish(pair, receiver)


def test_many_threads_and_loops_wait_for_one_transfer(pair: Pair, receiver: EmbeddingReceiver) -> None:
    begun, ended = threading.Barrier(9), []

    def by_thread() -> None:
        begun.wait(SECONDS)
        wait(receiver, SECONDS)
        ended.append(receiver.poll())

    def by_loop() -> None:
        async def several() -> None:
            await asyncio.gather(*(transferred(receiver) for _ in range(5)))

        begun.wait(SECONDS)
        asyncio.run(several())
        ended.append(receiver.poll())

    threads = [threading.Thread(target=target) for target in (by_thread, by_loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    begun.wait(SECONDS)
    pair.sender(7, ROWS)
    for thread in threads:
        thread.join(SECONDS)
    assert ended == [KVPoll.Success] * 8
    assert nothing_waits(receiver)


def test_every_wait_ends_with_the_reason_of_a_failure(pair: Pair, receiver: EmbeddingReceiver) -> None:
    async def several() -> list[BaseException | None]:
        tasks = [asyncio.create_task(transferred(receiver)) for _ in range(3)]
        await asyncio.sleep(0)
        receiver.abort(Aborted("withdrawn"))
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(error, Aborted) for error in asyncio.run(several()))
    for _ in range(2):
        with pytest.raises(Aborted, match="withdrawn"):
            wait(receiver, SECONDS)
    assert nothing_waits(receiver)


def test_the_end_of_a_manager_ends_every_wait(receiver: EmbeddingReceiver, pair: Pair) -> None:
    errors: list[BaseException] = []

    def waits() -> None:
        try:
            wait(receiver, SECONDS)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=waits)
    thread.start()
    pair.receiving.close()
    thread.join(SECONDS)
    assert [type(error) for error in errors] == [Aborted]
    with pytest.raises(Aborted):
        asyncio.run(transferred(receiver))


def test_nothing_keeps_what_a_finished_wait_has_used(pair: Pair, receiver: EmbeddingReceiver) -> None:
    class Used:
        def __call__(self) -> None: ...

    used = Used()
    gone = weakref.ref(used)
    for register in (receiver.on_change, receiver.wake_on_change):
        unregister = register(used)
        unregister()
        unregister()  # twice does no harm
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(transferred(receiver)) for _ in range(2)]
    loop.run_until_complete(asyncio.sleep(0))
    for task in tasks:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.close()
    loops = [weakref.ref(loop), *map(weakref.ref, tasks)]
    finish(pair, receiver)
    del used, loop, tasks, task, register, unregister
    gc.collect()
    assert gone() is None
    assert [ref() for ref in loops] == [None] * 3


def test_a_program_can_poll_from_a_callback(pair: Pair, receiver: EmbeddingReceiver) -> None:
    seen: list[KVPoll] = []
    done = threading.Event()

    def look() -> None:
        seen.append(receiver.poll())
        if seen[-1] is KVPoll.Success:
            done.set()

    stop = receiver.on_change(look)
    pair.sender(7, ROWS)
    assert done.wait(SECONDS)
    stop()
    assert nothing_waits(receiver)
