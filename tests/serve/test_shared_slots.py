"""Slots on an event loop that clients share."""

from __future__ import annotations

import asyncio

import pytest

from embferry.serve.shared_slots import SharedSlots
from embferry.serve.shared_threads import acting_for

pytestmark = pytest.mark.asyncio


class Users:
    """Tasks that each hold a slot until they are cancelled.

    Attributes:
        holding: the clients of the tasks that hold one, in the order in which they got it.
    """

    def __init__(self, slots: SharedSlots) -> None:
        self.slots, self.holding = slots, list[str]()

    def __call__(self, client: str) -> asyncio.Task[None]:
        async def hold() -> None:
            async with self.slots.taken():
                self.holding.append(client)
                await asyncio.Event().wait()

        with acting_for(client):
            return asyncio.create_task(hold())


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_each_client_that_comes_finds_a_slot_however_many_others_ask_for() -> None:
    users = Users(SharedSlots(8))
    tasks = [users(client) for client in "a" * 20 + "b" * 20 + "c" * 20 + "d" * 20]
    await settle()
    assert "".join(users.holding) == "aaaabbcd"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    alone = [users("e") for _ in range(20)]
    await settle()
    assert users.holding.count("e") == 4, "all have been given back"
    for task in alone:
        task.cancel()
    await asyncio.wait(alone)


async def test_of_those_that_wait_the_client_with_the_fewest_is_next() -> None:
    users = Users(SharedSlots(4))
    first = [users("a") for _ in range(10)]
    await settle()
    others = [users(client) for client in "bc"]
    waiting = users("d")
    await settle()
    assert "".join(users.holding) == "aabc"
    first[0].cancel()
    await settle()
    assert "".join(users.holding) == "aabcd"
    for task in (*first, *others, waiting):
        task.cancel()
    await asyncio.wait((*first, *others, waiting))


async def test_a_turn_that_is_cancelled_leaves_its_queue_also_when_it_was_just_given() -> None:
    users = Users(SharedSlots(1))
    holder, waiting, just_given, last = (users("a") for _ in range(4))
    await settle()
    waiting.cancel()
    await settle()
    holder.cancel()
    await asyncio.sleep(0)
    assert (users.slots._free, users.holding) == (0, ["a"]), "the slot is the next one's, which has not run yet"
    just_given.cancel()
    await settle()
    assert users.holding == ["a", "a"]
    last.cancel()
    await asyncio.wait({last})
    assert users.slots._free == 1
