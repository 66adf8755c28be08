"""The cache that encoders share, at a producer without vLLM: what it finds, what it keeps, and what a fault costs."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embferry import LocalProtocolError
from embferry.cache import encoder_store
from embferry.cache.contract import Accept
from embferry.cache.entry import Entry
from embferry.cache.folder import FolderStore
from embferry.connectors.shared.shape import digest_of
from embferry.connectors.vllm import shared_cache as module
from embferry.connectors.vllm.config import parse
from embferry.connectors.vllm.item_key import Item
from embferry.connectors.vllm.shared_cache import SharedCache
from tests.cache.stubborn import Stubborn, refuse

from .cache_encoder import Encoder, item
from .pair import GUARD_S, SHAPE, rows_like, until

pytestmark = pytest.mark.integration


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "cache", 1 << 30)


@pytest.fixture
def start() -> Iterator[Callable[..., Encoder]]:
    made: list[Encoder] = []

    def new(*arguments: Any, **options: Any) -> Encoder:
        made.append(Encoder(*arguments, **options))
        return made[-1]

    yield new
    for each in made:
        each.close()


Start = Callable[..., Encoder]


def test_a_restart_costs_no_encode(store: FolderStore) -> None:
    with closing(Encoder(store)) as first:
        assert np.array_equal(first.ask(item("a"), seed=7), rows_like(7))
        assert first.count("shared_cache_misses", "absent") == 1
    assert first.count("shared_cache_written_bytes") == sum(kept.nbytes for kept in store.files()) > SHAPE.nbytes
    with closing(Encoder(store)) as second:
        assert np.array_equal(second.ask(item("a"), seed=8), rows_like(7))
        assert (second.encodes, second.count("shared_cache_hits")) == (0, 1)
        assert np.array_equal(second.ask(item("a"), seed=8), rows_like(7))
        assert second.count("shared_cache_hits") == 1  # the second time it was in memory


def test_what_is_found_can_be_offered(store: FolderStore, start: Start) -> None:
    with closing(Encoder(store)) as first:
        first.ask(item("a"))
    second = start(store)
    second.ask(item("a"))
    assert second.producer.offer("a")["digest"] == digest_of(rows_like(0), SHAPE).hex()
    assert second.count("encodes_saved") == 1


@pytest.mark.parametrize(
    ("identity", "asked"),
    [
        (b"another model", item("a")),
        (b"model", item("a", content=1)),
        (b"model", item("b")),
        (b"model", item("a", tokens=SHAPE.tokens + 1)),
        (b"model", item("a")._replace(modality="video")),
    ],
)
def test_another_model_or_item_shares_nothing(store: FolderStore, start: Start, identity: bytes, asked: Item) -> None:
    with closing(Encoder(store)) as first:
        first.ask(item("a"), seed=1)
    second = start(store, identity)
    assert np.array_equal(second.ask(asked, seed=2), rows_like(2))
    assert (second.encodes, second.count("shared_cache_misses", "absent")) == (1, 1)


def test_an_adapter_that_changes_embeddings_shares_nothing(store: FolderStore, start: Start) -> None:
    encoder = start(store)
    feature = SimpleNamespace(identifier="adapter:a", modality="image", data={})
    asked = SimpleNamespace(lora_request=object(), get_num_encoder_embeds=lambda index: 4)
    assert [one.mm_hash for one in encoder.shared.items(asked, [(0, feature)])] == ["adapter:a"]
    encoder.shared._adapters_encode = True
    assert encoder.shared.items(asked, [(0, feature)]) == []
    asked.lora_request = None
    assert len(encoder.shared.items(asked, [(0, feature)])) == 1


def test_an_item_that_is_not_in_this_process_is_not_looked_up(start: Start) -> None:
    encoder = start(Stubborn())
    feature = SimpleNamespace(identifier="a", modality="image", data=None)
    asked = SimpleNamespace(lora_request=None, get_num_encoder_embeds=lambda index: 4)
    assert encoder.shared.items(asked, [(0, feature)]) == []
    encoder.ask(item("a")._replace(data={"pixel_values": SimpleNamespace(data=None)}))
    assert encoder.count("shared_cache_misses", "unnamed") == 1
    assert encoder.count("shared_cache_written_bytes") == 0


def test_an_embedding_is_kept_under_the_key_of_what_was_encoded(store: FolderStore, start: Start) -> None:
    """A client gives two pictures one name. The first request is aborted while its picture is being encoded."""
    encoder = start(store)
    one, two = item("a", content=1), item("a", content=2)
    until(lambda: not encoder.shared.is_searching("one", [one], lambda name: None))
    planned = encoder.shared.key("one", "a")  # goes to the worker with the step
    encoder.shared.forget("one", ["a"])
    until(lambda: not encoder.shared.is_searching("two", [two], lambda name: None))
    encoder.encode(one, planned, seed=1)
    assert encoder.shared.key("two", "a") not in ("", planned)
    encoder.close()
    assert [kept.key for kept in store.files()] == [planned]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_file_is_encoded_again(store: FolderStore, tmp_path: Path, start: Start, damage: str) -> None:
    with closing(Encoder(store)) as first:
        first.ask(item("a"))
    (path,) = (tmp_path / "cache").iterdir()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= damage == "flip"
    path.write_bytes({"flip": raw, "cut": raw[:-1], "empty": b"", "other": b"x" * len(raw)}[damage])
    with closing(Encoder(store)) as second:
        assert np.array_equal(second.ask(item("a"), seed=3), rows_like(3))
        assert (second.encodes, second.count("shared_cache_misses", "damaged")) == (1, 1)
    third = start(store)
    assert np.array_equal(third.ask(item("a"), seed=4), rows_like(3))
    assert third.encodes == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"hidden": 48}, "damaged"), ({"dtype": "float16"}, "damaged"), ({"limit": SHAPE.nbytes - 1}, "failed")],
)
def test_an_embedding_of_another_shape_is_not_used(
    store: FolderStore, start: Start, options: dict[str, Any], reason: str
) -> None:
    with closing(Encoder(store)) as first:
        first.ask(item("a"))
    second = start(store, **options)
    until(lambda: not second.shared.is_searching("r", [item("a")], lambda name: None))
    assert second.count("shared_cache_misses", reason) == 1
    assert second.producer.find("a") is None
    assert len(store.files()) == (reason == "failed")  # what is only too large for this engine stays


def test_deepstack_is_a_multiple_of_the_width(store: FolderStore, start: Start) -> None:
    with closing(Encoder(store, hidden=16)) as first:
        first.ask(item("a"))
    assert start(store, hidden=16).ask(item("a"), seed=5) is not None


def test_no_fault_of_the_store_fails_a_request(start: Start) -> None:
    for code in (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE):
        encoder = start(Stubborn(refuse(code), refuse(code)))
        assert np.array_equal(encoder.ask(item("a"), seed=6), rows_like(6))
        assert encoder.count("shared_cache_misses", "failed") == 1
        until(lambda encoder=encoder: encoder.count("shared_cache_dropped", "failed") == 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_has_a_reason_of_its_own(start: Start, code: int) -> None:
    encoder = start(Stubborn(write=refuse(code)))
    encoder.ask(item("a"))
    until(lambda: encoder.count("shared_cache_dropped", "no_space") == 1)


def test_an_embedding_larger_than_the_folder_is_dropped(tmp_path: Path, start: Start) -> None:
    encoder = start(FolderStore(tmp_path / "cache", SHAPE.nbytes))
    encoder.ask(item("a"))
    until(lambda: encoder.count("shared_cache_dropped", "too_large") == 1)


def test_a_store_that_hangs_costs_one_time_limit(start: Start) -> None:
    """Later requests do not wait at all until the store responds again."""
    hangs = threading.Event()
    store = Stubborn(lambda: hangs.wait(GUARD_S))
    encoder = start(store)
    items = [item(str(number)) for number in range(encoder_store.READERS)]
    assert encoder.shared.is_searching("r", items, lambda name: None)
    until(lambda: len(store.asked) == encoder_store.READERS)
    for lookup in encoder.shared._lookups.values():
        lookup.until = time.monotonic()  # and not sooner: what is given up before the store is asked does not hang
    assert not encoder.shared.is_searching("r", items, lambda name: None)
    assert encoder.count("shared_cache_misses", "late") == encoder_store.READERS
    encoder.shared._store.lookup_timeout = 0.05
    until(lambda: encoder.shared._store._readers.is_stalled(0.05))
    assert not encoder.shared.is_searching("s", [item("x")], lambda name: None)
    assert encoder.count("shared_cache_misses", "busy") == 1
    hangs.set()
    until(lambda: not encoder.shared._store._readers.is_stalled(0.05))
    encoder.shared._store.lookup_timeout = GUARD_S
    until(lambda: not encoder.shared.is_searching("t", [item("y")], lambda name: None))
    assert encoder.count("shared_cache_misses", "absent") == 1


def test_an_embedding_that_is_found_too_late_is_not_used(store: FolderStore, start: Start) -> None:
    with closing(Encoder(store)) as first:
        first.ask(item("a"))
    slow, blocker, read = threading.Event(), threading.Event(), store.read

    def late(key: str, accept: Accept) -> Entry | None:
        slow.set()
        assert blocker.wait(GUARD_S)
        return read(key, accept)

    store.read = late  # type: ignore[method-assign]
    second = start(store)
    assert second.shared.is_searching("r", [item("a")], lambda name: None)
    assert slow.wait(GUARD_S)
    second.shared.forget("r", ["a"])
    blocker.set()
    assert second.shared._store._readers.close(GUARD_S)
    assert second.producer.find("a") is None
    assert (second.count("shared_cache_hits"), second.count("shared_cache_misses", "late")) == (0, 0)


@contextmanager
def writing(start: Start, names: str) -> Iterator[Encoder]:
    """Yields an encoder whose first write hangs, after it has encoded these items too."""
    hangs, began = threading.Event(), threading.Event()

    def write() -> None:
        began.set()
        assert hangs.wait(GUARD_S)

    encoder = start(Stubborn(write=write))
    encoder.ask(item("first"))
    assert began.wait(GUARD_S)
    for name in names:
        encoder.ask(item(name))
    try:
        yield encoder
    finally:
        hangs.set()


def test_a_full_queue_drops_a_write_and_nothing_waits(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_store, "MAX_WRITES", 2)
    with writing(start, "abc") as encoder:
        assert encoder.count("shared_cache_dropped", "queue_full") == 1
    store = encoder.shared._store._store
    assert isinstance(store, Stubborn)
    until(lambda: len(store.written) == 3)


def test_the_bytes_that_wait_to_be_written_are_bounded(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_store, "MAX_WRITE_BYTES", SHAPE.nbytes)
    with writing(start, "ab") as encoder:
        assert encoder.count("shared_cache_dropped", "queue_full") == 1


def test_too_many_lookups_are_misses(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_store, "MAX_LOOKUPS", 1)
    hangs = threading.Event()
    encoder = start(Stubborn(lambda: hangs.wait(GUARD_S)))
    items = [item(str(number)) for number in range(20)]
    assert encoder.shared.is_searching("r", items, lambda name: None)
    assert encoder.count("shared_cache_misses", "busy") >= 20 - encoder_store.READERS - 1
    hangs.set()


def test_a_model_that_cannot_be_identified_fails_the_start(store: FolderStore) -> None:
    with pytest.raises(LocalProtocolError, match="cannot be read"):
        Encoder(store, identify=lambda: (_ for _ in ()).throw(OSError("the weights cannot be read")))


def test_nothing_is_shared_until_the_model_is_identified(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDENTIFY_S", 0.01)
    known = threading.Event()

    def identify() -> bytes:
        assert known.wait(GUARD_S)
        return b"model"

    encoder = start(Stubborn(), identify=identify)
    encoder.ask(item("a"))
    assert encoder.count("shared_cache_misses", "unidentified") == 1
    known.set()
    until(lambda: encoder.shared._identity)
    encoder.ask(item("b"))
    store = encoder.shared._store._store
    assert isinstance(store, Stubborn)
    until(lambda: len(store.written) == 1)


def test_what_is_queued_is_written_at_the_end(store: FolderStore) -> None:
    with closing(Encoder(store)) as encoder:
        for number in range(20):
            encoder.ask(item(str(number)))
    assert len(store.files()) == 20


@pytest.mark.parametrize(
    ("cache", "why"),
    [
        ({}, "url"),
        ({"url": "s3://bucket"}, "begins with"),
        ({"url": "file:///a", "size": 1}, "size"),
        ({"url": "file:///a", "max_bytes": 0}, "max_bytes"),
    ],
)
def test_a_setting_that_is_wrong_ends_the_start(cache: dict[str, Any], why: str) -> None:
    with pytest.raises(LocalProtocolError, match=why):
        parse({"cache": cache})


def test_the_settings_are_read() -> None:
    config = parse({"cache": {"url": "file:///a", "max_bytes": 1000}})
    assert config.cache is not None
    assert (config.cache.url, config.cache.max_bytes) == ("file:///a", 1000)


# Mutants: without one of these checks, a wrong embedding would be used


def breaks(test: Callable[[], object]) -> None:
    with pytest.raises(AssertionError):
        test()


def test_the_model_must_be_part_of_the_key(store: FolderStore, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.item_key
    monkeypatch.setattr(module, "item_key", lambda identity, asked: real(b"", asked))
    breaks(lambda: test_another_model_or_item_shares_nothing(store, start, b"another model", item("a")))


def test_the_content_must_be_part_of_the_key(store: FolderStore, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.item_key
    monkeypatch.setattr(module, "item_key", lambda identity, asked: real(identity, asked._replace(data={})))
    breaks(lambda: test_another_model_or_item_shares_nothing(store, start, b"model", item("a", content=1)))


def test_the_shape_must_be_checked(store: FolderStore, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SharedCache, "_checked", lambda self, entry, asked: SHAPE)
    breaks(lambda: test_an_embedding_of_another_shape_is_not_used(store, start, {"hidden": 48}, "damaged"))
