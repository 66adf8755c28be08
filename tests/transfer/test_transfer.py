"""Whole transfers through managers, over every transport."""

from __future__ import annotations

import asyncio
import threading

import pytest

from embferry import ChunkSink, EmbeddingReceiver, GatherSink, SendManager, transferred, wait
from embferry.protocol.errors import Aborted, LayoutMismatch, LeaseExpired, LocalProtocolError, PeerGone
from embferry.protocol.layout import Field, Layout
from embferry.protocol.states import KVPoll

from .conftest import LAYOUT, SECONDS, MakePair, Pair, embedding, kill, let_expire, same


def until(receiver: EmbeddingReceiver, condition: object) -> None:
    """Waits until ``condition()`` holds. Checks it whenever the receiver changes."""
    assert callable(condition)
    changed = threading.Event()
    receiver.on_change(changed.set)
    while not condition():
        assert changed.wait(SECONDS), "nothing changed"
        changed.clear()


def pool_is_whole(pair: Pair) -> bool:
    """Waits for the last releases. Returns whether every block is free."""
    deadline = pair.receiving.now() + SECONDS
    while pair.receiving.allocator.available < pair.receiving.geometry.num_blocks:
        if pair.receiving.now() > deadline:
            return False
        pair.receiving.wake()
        threading.Event().wait(0.001)
    return True


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 1000])
def test_an_embedding_of_any_length_arrives_whole(make_pair: MakePair, tokens: int) -> None:
    pair = make_pair()
    rows = embedding(tokens)
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert receiver.total_embedding_length == receiver.transferred_tokens == tokens
    wait(sender, SECONDS)
    assert sender.poll() is KVPoll.Success
    receiver.clear()
    assert pool_is_whole(pair)


def test_an_embedding_larger_than_the_pool_takes_several_transfers(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=2, block_size=8)
    rows = embedding(200)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert receiver.transfers >= 200 / 16
    assert same(receiver.arrays(), rows)


def test_a_pool_of_one_token_is_enough(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=1, block_size=1)
    rows = embedding(37)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert receiver.transfers == 37
    assert same(receiver.arrays(), rows)


def test_tokens_are_sent_as_they_are_produced(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=8)
    rows = embedding(100)
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, rows, ready=0)
    until(receiver, lambda: receiver.total_embedding_length == 100 or receiver.poll() is KVPoll.WaitingForInput)
    for ready in (20, 50, 100):
        sender.send_embedding(rows, ready)
        whole_blocks = ready if ready == 100 else ready // 16 * 16
        until(receiver, lambda whole=whole_blocks: receiver.transferred_tokens >= whole)
        assert same(
            {k: v[:whole_blocks] for k, v in receiver.arrays().items()}, {k: v[:whole_blocks] for k, v in rows.items()}
        )
    wait(receiver, SECONDS)


def test_the_caller_can_allocate_the_blocks(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=4, block_size=16)
    rows = embedding(100)
    receiver = pair.receiver()
    first = pair.receiving.allocator.alloc(48, receiver.room)
    assert first is not None
    receiver.init(first)
    pair.sender(receiver.room, rows)
    until(receiver, lambda: receiver.transferred_tokens == 48)
    assert receiver.needs_resume
    with pytest.raises(LocalProtocolError, match="resume at token 48"):
        receiver.resume_transfer(sent_tokens=47)
    second = pair.receiving.allocator.alloc(16, receiver.room)
    assert second is not None
    assert receiver.resume_transfer(second, sent_tokens=48) == 16
    until(receiver, lambda: receiver.transferred_tokens == 64)
    assert receiver.resume_transfer(sent_tokens=64) == 0  # the pool grants the rest
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)


def test_blocks_of_a_first_allocation_that_are_not_needed_are_released(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=8)
    receiver = pair.receiver()
    receiver.init(pair.receiving.allocator.alloc(8 * 16, receiver.room))
    pair.sender(receiver.room, embedding(20))
    wait(receiver, SECONDS)
    assert receiver.transfers == 1
    assert pool_is_whole(pair)


@pytest.mark.parametrize("early", [False, True])
def test_an_embedding_in_adjacent_blocks_is_used_in_place(make_pair: MakePair, early: bool) -> None:
    pair = make_pair(num_blocks=8, chunk_bytes=16 * LAYOUT.token_bytes, default_allocate_tokens=8 * 16)
    rows = embedding(100)
    sink = GatherSink(in_place=True)
    receiver = pair.receiver(sink=sink)
    receiver.init()
    if early:  # the first grant is made before the length is known, and gives back what is not needed
        sender = pair.sending.open(receiver.room)
        until(receiver, lambda: receiver.transfers)
        sender.init(100, b"digest")
        sender.send_embedding(rows)
    else:
        pair.sender(receiver.room, rows)
    wait(receiver, SECONDS)
    assert sink.in_place
    assert same(receiver.arrays(), rows)
    assert pair.receiving.allocator.available == 1
    receiver.clear()
    assert pool_is_whole(pair)


def test_chunks_can_be_consumed_without_gathering(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=3, block_size=8)
    rows = embedding(100)
    sink = ChunkSink()
    receiver = pair.receiver(sink=sink)
    receiver.init()
    pair.sender(receiver.room, rows)
    seen = 0
    while seen < 100:
        until(receiver, lambda: sink.peek() is not None)
        chunk = sink.pop()
        assert chunk is not None
        offset, length = chunk.chunk_info
        assert same(sink.read(chunk), {k: v[offset : offset + length] for k, v in rows.items()})
        chunk.release()
        seen += length
        assert receiver.machine.committed  # a consumed chunk cannot be replaced by another content
    wait(receiver, SECONDS)
    receiver.clear()
    assert pool_is_whole(pair)


def test_many_transfers_share_a_small_pool_and_all_complete(make_pair: MakePair) -> None:
    pair = make_pair(num_blocks=4, block_size=8)
    sizes = [1 + 13 * i % 150 for i in range(40)]
    receivers = []
    for i, size in enumerate(sizes):
        receiver = pair.receiver()
        receiver.init()
        pair.sender(receiver.room, embedding(size, seed=i))
        receivers.append(receiver)
    for i, (size, receiver) in enumerate(zip(sizes, receivers, strict=True)):
        wait(receiver, SECONDS)
        assert same(receiver.arrays(), embedding(size, seed=i))
        receiver.clear()
    assert pool_is_whole(pair)


def test_the_encode_side_can_open_the_room_before_or_after_the_language_side(make_pair: MakePair) -> None:
    pair = make_pair()
    rows = embedding(50)
    early = pair.sender(1, rows)
    receiver = pair.receiver(room=1)
    receiver.init()
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    wait(early, SECONDS)
    late = pair.receiver(room=2)
    late.init()
    until(late, lambda: late.poll() is KVPoll.Bootstrapping)
    pair.sender(2, rows)
    wait(late, SECONDS)
    assert same(late.arrays(), rows)


def test_an_asyncio_task_can_wait_for_both_ends(make_pair: MakePair) -> None:
    pair = make_pair()
    rows = embedding(500)

    async def serve() -> None:
        receiver = pair.receiver()
        receiver.init()
        sender = pair.sender(receiver.room, rows)
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(transferred(receiver), transferred(sender))
        assert same(receiver.arrays(), rows)

    asyncio.run(serve())


def test_an_abort_of_the_encode_side_fails_the_language_side_with_its_reason(make_pair: MakePair) -> None:
    pair = make_pair()
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(1000), ready=64)
    until(receiver, lambda: receiver.transferred_tokens >= 48)
    sender.abort(Aborted("the request was withdrawn"))
    with pytest.raises(Aborted, match="withdrawn"):
        wait(receiver, SECONDS)
    receiver.clear()
    assert pool_is_whole(pair)


def test_an_abort_of_the_language_side_releases_the_source(make_pair: MakePair) -> None:
    pair = make_pair()
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(1000), ready=64)
    until(receiver, lambda: receiver.transferred_tokens >= 48)
    receiver.abort()
    with pytest.raises(Aborted):
        wait(sender, SECONDS)
    assert sender.source_released
    receiver.clear()
    assert pool_is_whole(pair)


def test_different_layouts_are_rejected_when_the_room_is_opened(make_pair: MakePair) -> None:
    other = Layout((Field("input_embeddings", "float32", 24), *LAYOUT.fields[2:]))
    pair = make_pair(layout=other)
    receiver = pair.receiver()
    receiver.init()
    pair.sending.open(receiver.room)
    with pytest.raises(LayoutMismatch, match="deepstack_embeddings"):
        wait(receiver, SECONDS)


def test_a_dead_encode_side_fails_the_transfer_and_its_blocks_are_freed(make_pair: MakePair) -> None:
    pair = make_pair(drain_timeout=0.1)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, embedding(1000), ready=64)
    until(receiver, lambda: receiver.transferred_tokens >= 48)
    kill(pair.sending)  # its thread ends without a message, as in a killed process
    let_expire(pair.receiving, pair.sending.settings.peer_timeout, receiver)
    with pytest.raises(PeerGone):
        wait(receiver, SECONDS)
    receiver.clear()
    assert pool_is_whole(pair)


def test_another_encode_worker_resumes_at_the_first_missing_token(make_pair: MakePair) -> None:
    pair = make_pair()
    rows = embedding(1000)
    receiver = pair.receiver()
    receiver.init()
    pair.sender(receiver.room, rows, ready=320)
    until(receiver, lambda: receiver.transferred_tokens == 320)
    kill(pair.sending)
    second = SendManager(LAYOUT, [pair.transport()], settings=pair.sending.settings)
    pair.extra.append(second)
    receiver.redirect(second.endpoint)
    sender = second.open(receiver.room)
    sender.init(1000, b"digest")
    sender.send_embedding(rows)
    wait(receiver, SECONDS)
    assert same(receiver.arrays(), rows)
    assert sender.sent_bytes == 680 * LAYOUT.token_bytes  # tokens that had arrived were not sent again


def test_a_dead_language_side_releases_the_source(make_pair: MakePair) -> None:
    pair = make_pair()
    receiver = pair.receiver()
    receiver.init()
    sender = pair.sender(receiver.room, embedding(1000), ready=64)
    until(receiver, lambda: receiver.transferred_tokens >= 48)
    kill(pair.receiving)
    let_expire(pair.sending, pair.sending.settings.lease_timeout, sender)
    with pytest.raises(LeaseExpired):
        wait(sender, SECONDS)
    assert sender.source_released


def test_misuse_is_rejected_with_an_explanation(make_pair: MakePair) -> None:
    pair = make_pair()
    rows = embedding(10)
    sender = pair.sending.open(7)
    with pytest.raises(LocalProtocolError, match="in use"):
        pair.sending.open(7)
    with pytest.raises(LocalProtocolError, match="bytes"):
        sender.init(10, b"")
    sender.init(10, b"d")
    with pytest.raises(LocalProtocolError, match="fill_ids is missing"):
        sender.send_embedding({k: v for k, v in rows.items() if k != "fill_ids"})
    with pytest.raises(LocalProtocolError, match="announced"):
        sender.send_embedding(embedding(11))
    with pytest.raises(LocalProtocolError, match="announced once"):
        sender.init(11, b"d")
    with pytest.raises(LocalProtocolError, match="tcp://"):
        pair.receiving.open(7, "http://elsewhere")
    receiver = pair.receiver()
    with pytest.raises(LocalProtocolError, match="init"):
        receiver.resume_transfer()
    receiver.init()
    with pytest.raises(LocalProtocolError, match="arrived"):
        receiver.arrays()
    with pytest.raises(LocalProtocolError, match="not failed"):
        receiver.failure_exception()
