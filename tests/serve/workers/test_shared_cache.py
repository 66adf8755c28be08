"""The cache that encoders share, at an encode worker: what it finds, what it keeps, and what a fault costs."""

from __future__ import annotations

import asyncio
import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from embferry.cache import encoder_store
from embferry.cache.contract import Accept
from embferry.cache.entry import Entry
from embferry.cache.folder import FolderStore
from embferry.serve.encode import shared_cache as module
from embferry.serve.encode.shared_cache import SharedCache, item_key
from embferry.transports.in_memory.transport import InMemoryTransport
from tests.cache.stubborn import Stubborn, refuse
from tests.serve.pictures import png, video
from tests.serve.workers.joined import DEADLINE, Joined, Models, run, settings_for

PICTURE = {"kind": "image", "data": png(96, 64, "red")}
OTHER = {"kind": "image", "data": png(80, 80, "blue")}
FILM = {"kind": "video", "data": video(8)}

Start = Callable[..., Joined]


@pytest.fixture
def start(models: Models) -> Iterator[Start]:
    """Returns a function that starts two workers, of which the first has this store."""
    with ExitStack() as stack:

        def new(store: Any, **sections: Any) -> Joined:
            return stack.enter_context(Joined(models, InMemoryTransport, settings_for(**sections), store))

        yield new


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "cache", 1 << 30)


def count(joined: Joined, name: str, **labels: str) -> float:
    return joined.encode.metrics.registry.get_sample_value(f"embferry_encode_{name}_total", labels) or 0.0


def encodes(joined: Joined) -> float:
    return sum(count(joined, "items_encoded", kind=kind) for kind in ("image", "video"))


def misses(joined: Joined, reason: str) -> float:
    return count(joined, "shared_cache_misses", reason=reason)


def ask(joined: Joined, *items: dict[str, Any]) -> list[int]:
    """Returns the tokens of an answer, which is right."""
    answer = run(joined.ask("what is there?", *items))
    assert answer.status == 200
    assert answer.tokens == joined.reference("what is there?", *items)
    return answer.tokens


def fill(start: Start, models: Models, store: FolderStore, *items: dict[str, Any]) -> list[int]:
    """Has a worker encode and keep these items, and ends it. Returns the tokens of its answer."""
    with Joined(models, InMemoryTransport, settings_for(), store) as first:
        tokens = ask(first, *items)
        assert encodes(first) == misses(first, "absent") == len(items)
    assert count(first, "shared_cache_written_bytes") == sum(kept.nbytes for kept in store.files()) > 0
    assert len(store.files()) == len(items)
    return tokens


@pytest.mark.parametrize("cache_bytes", [1 << 28, 0])
@pytest.mark.parametrize("items", [(PICTURE,), (PICTURE, FILM, OTHER)], ids=["one", "three"])
def test_a_restart_costs_no_encode(
    start: Start, models: Models, store: FolderStore, cache_bytes: int, items: tuple[dict[str, Any], ...]
) -> None:
    tokens = fill(start, models, store, *items)
    second = start(store, encode={"cache_bytes": cache_bytes})
    assert ask(second, *items) == tokens
    assert (encodes(second), count(second, "shared_cache_hits")) == (0, len(items))
    assert ask(second, *items) == tokens
    in_memory = len(items) if cache_bytes else 0
    assert (encodes(second), count(second, "shared_cache_hits")) == (0, 2 * len(items) - in_memory)
    second.wait(lambda: second.encode.load == 0)
    assert (second.encode.cache.held_bytes == 0) == (cache_bytes == 0)


def test_only_what_is_not_there_is_encoded(start: Start, models: Models, store: FolderStore) -> None:
    fill(start, models, store, PICTURE)
    second = start(store)
    ask(second, OTHER, PICTURE)
    assert (encodes(second), count(second, "shared_cache_hits"), misses(second, "absent")) == (1, 1, 1)


def test_another_model_shares_nothing(
    start: Start, models: Models, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(start, models, store, PICTURE)
    monkeypatch.setattr(module, "identity_of", lambda encoder: b"another model")
    second = start(store)
    ask(second, PICTURE)
    assert (encodes(second), misses(second, "absent")) == (1, 1)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_file_is_encoded_again(
    start: Start, models: Models, store: FolderStore, tmp_path: Path, damage: str
) -> None:
    fill(start, models, store, PICTURE)
    (path,) = (tmp_path / "cache").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= damage == "flip"
    path.write_bytes({"flip": raw, "cut": raw[:-1], "empty": b"", "other": b"x" * len(raw)}[damage])
    second = start(store)
    ask(second, PICTURE)
    assert (encodes(second), misses(second, "damaged")) == (1, 1)
    second.wait(lambda: count(second, "shared_cache_written_bytes") > 0)
    third = start(store)
    ask(third, PICTURE)
    assert (encodes(third), count(third, "shared_cache_hits")) == (0, 1)


def exchanged(store: FolderStore, change: Callable[[Entry], tuple[Entry, int]]) -> None:
    """Puts another embedding, whole and with its digest, in the place of the one in the store."""
    (kept,) = store.files()
    entry, nbytes = change(store.describe(kept.key))
    data = memoryview(bytes(nbytes))
    digest = module.digest_of(entry.layout, entry.tokens, lambda at, end: (data[at:end],))
    store.remove(kept.key)
    store.write(Entry(kept.key, entry.layout, entry.tokens, digest, entry.model), data)


def other_tokens(entry: Entry) -> tuple[Entry, int]:
    fewer = Entry(entry.key, entry.layout, entry.tokens - 1, entry.digest)
    return fewer, fewer.nbytes


def other_layout(entry: Entry) -> tuple[Entry, int]:
    fields = entry.layout.fields
    narrow = module.msgspec.structs.replace(fields[0], width=fields[0].width // 2)
    other = Entry(entry.key, module.Layout((narrow, *fields[1:])), entry.tokens, entry.digest)
    return other, other.nbytes


@pytest.mark.parametrize("change", [other_tokens, other_layout])
def test_an_embedding_of_another_shape_is_not_used(
    start: Start, models: Models, store: FolderStore, change: Callable[[Entry], tuple[Entry, int]]
) -> None:
    fill(start, models, store, PICTURE)
    exchanged(store, change)
    second = start(store)
    ask(second, PICTURE)
    assert (encodes(second), misses(second, "damaged")) == (1, 1)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOSPC, errno.EDQUOT])
def test_no_fault_of_the_store_fails_a_request(start: Start, code: int) -> None:
    joined = start(Stubborn(refuse(code), refuse(code)))
    ask(joined, PICTURE)
    assert (encodes(joined), misses(joined, "failed")) == (1, 1)
    reason = "no_space" if code in (errno.ENOSPC, errno.EDQUOT) else "failed"
    joined.wait(lambda: count(joined, "shared_cache_dropped", reason=reason) == 1)


def test_a_store_that_hangs_costs_one_time_limit(start: Start) -> None:
    """Later requests do not wait at all until the store responds again."""
    hangs = threading.Event()
    joined = start(Stubborn(lambda: hangs.wait(DEADLINE)), cache={"lookup_timeout": 0.05})
    try:
        ask(joined, PICTURE, OTHER)
        assert misses(joined, "late") == 2
        assert joined.encode._shared is not None
        readers = joined.encode._shared._store._readers
        joined.wait(lambda: readers.is_stalled(0.05))
        ask(joined, FILM)
        assert misses(joined, "busy") == 1
    finally:
        hangs.set()
    joined.wait(lambda: not readers.is_stalled(0.05))
    third = {"kind": "image", "data": png(64, 64, "green")}
    ask(joined, third)
    assert encodes(joined) == 4


def test_other_requests_go_on_while_one_waits_for_a_lookup(start: Start) -> None:
    hangs, began = threading.Event(), threading.Event()

    def read() -> None:
        began.set()
        assert hangs.wait(DEADLINE)

    store = Stubborn()
    joined = start(store, num_blocks=64, cache={"lookup_timeout": 1000})  # blocks for both
    ask(joined, OTHER)  # in memory from now on
    store._read = read

    async def both() -> list[int]:
        waiting = asyncio.create_task(joined.ask("what is there?", PICTURE))
        try:
            assert await asyncio.to_thread(began.wait, DEADLINE)
            other = await joined.ask("what is there?", OTHER)
            assert other.tokens == joined.reference("what is there?", OTHER)
            assert not waiting.done()
        finally:
            hangs.set()
        return (await waiting).tokens

    assert run(both()) == joined.reference("what is there?", PICTURE)


def test_nothing_is_read_before_a_language_worker_has_asked(start: Start) -> None:
    store = Stubborn()
    joined = start(store)
    assert run(joined.post_encode(PICTURE, room=1)).status_code == 200
    joined.encode._wake.set()
    ask(joined, OTHER)
    assert len(store.asked) == 1
    joined.encode.abort_room(1)


def test_an_embedding_that_is_found_too_late_is_not_used(
    start: Start, models: Models, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(start, models, store, PICTURE)
    hangs, read = threading.Event(), store.read

    def late(key: str, accept: Accept) -> Entry | None:
        assert hangs.wait(DEADLINE)
        return read(key, accept)

    monkeypatch.setattr(store, "read", late)
    joined = start(store, encode={"cache_bytes": 0}, cache={"lookup_timeout": 0.05})
    try:
        ask(joined, PICTURE)
    finally:
        hangs.set()
    assert joined.encode._shared is not None
    assert joined.encode._shared._store._readers.close(DEADLINE)
    assert (misses(joined, "late"), count(joined, "shared_cache_hits")) == (1, 0)
    joined.wait(lambda: joined.encode.load == 0)
    assert joined.encode.cache.held_bytes == 0


def test_a_room_that_ends_lets_go_of_what_was_found(
    start: Start, models: Models, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of the second item is here, and the first is still being looked up, when the room is aborted."""
    fill(start, models, store, PICTURE, OTHER)
    hangs, read, seen = threading.Event(), store.read, threading.Event()

    def slow_first(key: str, accept: Accept) -> Entry | None:
        if not seen.is_set():
            seen.set()
            assert hangs.wait(DEADLINE)
        return read(key, accept)

    monkeypatch.setattr(store, "read", slow_first)
    joined = start(store, encode={"cache_bytes": 0}, cache={"lookup_timeout": 1000})
    assert run(joined.post_encode(PICTURE, OTHER, room=1)).status_code == 200
    room = joined.encode.room(1)
    assert room is not None
    joined.encode.claim(room)
    try:
        joined.wait(lambda: joined.encode.cache.held_bytes > 0)
        joined.encode.abort_room(1)
    finally:
        hangs.set()
    joined.wait(lambda: joined.encode.load == 0)
    joined.wait(lambda: joined.encode.cache.held_bytes == 0)
    assert encodes(joined) == 0


def test_what_is_queued_is_written_at_the_end(start: Start, models: Models, store: FolderStore) -> None:
    slow = Stubborn(write=lambda: time.sleep(0.05))
    with Joined(models, InMemoryTransport, settings_for(), slow) as joined:
        for number in range(5):
            ask(joined, {"kind": "image", "data": png(64, 64, f"rgb({number},0,0)")})
    assert len(slow.written) == 5
    assert slow.is_closed


def test_a_full_queue_drops_a_write_and_nothing_waits(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_store, "MAX_WRITES", 1)
    hangs, began = threading.Event(), threading.Event()

    def write() -> None:
        began.set()
        assert hangs.wait(DEADLINE)

    joined = start(Stubborn(write=write))
    try:
        ask(joined, PICTURE)
        assert began.wait(DEADLINE)
        ask(joined, OTHER, FILM)
        assert count(joined, "shared_cache_dropped", reason="queue_full") == 1
    finally:
        hangs.set()


# Mutants: without one of these checks, a wrong embedding would be used, or memory would never be released


def breaks(test: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        test()


def test_the_identity_must_be_part_of_the_key(
    start: Start, models: Models, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "item_key", lambda identity, shape, tokens: item_key(b"", shape, tokens))
    breaks(lambda: test_another_model_shares_nothing(start, models, store, monkeypatch))


def test_the_content_must_be_part_of_the_key(
    start: Start, models: Models, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, "item_key", lambda identity, shape, tokens: item_key(identity, replace(shape, digest=b""), 0)
    )
    same_size = {"kind": "image", "data": png(96, 64, "blue")}
    fill(start, models, store, PICTURE)
    second = start(store)
    run(second.ask("what is there?", same_size))
    assert encodes(second) == 0  # the embedding of another picture was used


@pytest.mark.parametrize("change", [other_tokens, other_layout])
def test_the_shape_must_be_checked(
    start: Start,
    models: Models,
    store: FolderStore,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Entry], tuple[Entry, int]],
) -> None:
    monkeypatch.setattr(SharedCache, "_check", lambda self, entry, tokens: None)
    breaks(lambda: test_an_embedding_of_another_shape_is_not_used(start, models, store, change))
