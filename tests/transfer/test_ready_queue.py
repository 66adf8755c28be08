"""The queue of transfers to process: it keeps nothing of a transfer that has been forgotten."""

from __future__ import annotations

import gc
import random
import weakref

from embferry.transfer.ready_queue import MAX_STALE, ReadyQueue


class Transfer:
    pass


def test_forgotten_transfers_are_not_kept_until_their_timers_expire() -> None:
    queue, kept = ReadyQueue[Transfer](), weakref.WeakSet[Transfer]()
    for _ in range(10 * MAX_STALE):
        transfer = Transfer()
        kept.add(transfer)
        queue.schedule(transfer, 60.0)
        queue.forget(transfer)
        del transfer
    gc.collect()
    assert len(kept) <= MAX_STALE + 1


def test_a_timer_that_is_put_off_again_and_again_takes_no_memory() -> None:
    queue, transfers = ReadyQueue[int](), range(100)
    for time in range(10_000):
        queue.schedule(transfers[time % 100], 60.0 + time)
    assert len(queue._heap) <= 2 * len(transfers) + MAX_STALE + 1


def test_timers_expire_in_order_whatever_is_dropped() -> None:
    draw, queue, times = random.Random(0), ReadyQueue[int](), dict[int, float]()
    for _ in range(5_000):
        item = draw.randrange(40)
        if draw.random() < 0.3:
            queue.forget(item)
            times.pop(item, None)
        else:
            times[item] = draw.uniform(0, 100)
            queue.schedule(item, times[item])
    assert queue.next() == min(times.values())
    for now in range(101):
        due = {item for item, time in times.items() if time <= now}
        assert set(queue.due(now)) == due
        for item in due:
            del times[item]
    assert queue.next() is None
