"""The cache of embeddings: hits, eviction, pins, and concurrent lookups."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from embferry.engine.cache import EmbeddingCache
from embferry.engine.embedding import Embedding
from embferry.engine.shape import MediaShape

DEADLINE = 10


def embedding(tokens: int = 4) -> Embedding:
    return Embedding(MediaShape("image", (1, 2, 2 * tokens)), {"input_embeddings": torch.zeros(tokens, 8)})


SIZE = embedding().nbytes


class Encodes:
    """An encoder that counts its calls, and can be held up or made to fail."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.calls = 0
        self.started = threading.Event()
        self.go = threading.Event()
        self.go.set()
        self.error = error

    def __call__(self) -> Embedding:
        self.calls += 1
        self.started.set()
        assert self.go.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        return embedding()


def keys(count: int) -> list[bytes]:
    return [bytes([number]) for number in range(count)]


def test_a_second_lookup_is_a_hit():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes()
    with cache.pin(b"a", encode) as first, cache.pin(b"a", encode) as second:
        assert first is second
    assert (encode.calls, cache.counters.hits, cache.counters.misses) == (1, 1, 1)
    assert cache.held_bytes == SIZE


def test_the_least_recently_used_embedding_is_evicted_first():
    cache = EmbeddingCache(2 * SIZE)
    a, b, c = keys(3)
    for key in (a, b, a, c):
        cache.pin(key, embedding).release()
    assert sorted(cache._entries) == [a, c]
    assert cache.counters.evictions == 1
    assert cache.held_bytes == 2 * SIZE


def test_a_pinned_embedding_is_not_evicted():
    cache = EmbeddingCache(SIZE)
    a, b, c = keys(3)
    held = cache.pin(a, embedding)
    again = cache.pin(a, embedding)
    for key in (b, c):
        cache.pin(key, embedding).release()
    assert a in cache._entries
    held.release()
    held.release()
    cache.pin(b, embedding).release()
    assert a in cache._entries, "one pin was released twice, the other one still holds"
    again.release()
    cache.pin(c, embedding).release()
    assert a not in cache._entries
    assert cache.held_bytes <= cache.budget_bytes


def test_an_embedding_larger_than_the_budget_is_evicted_after_use():
    cache = EmbeddingCache(SIZE - 1)
    with cache.pin(b"a", embedding):
        assert cache.held_bytes == SIZE
    assert (len(cache._entries), cache.held_bytes) == (0, 0)


@pytest.mark.parametrize("budget", [0, 10 * SIZE])
def test_concurrent_lookups_encode_once(budget):
    cache, encode = EmbeddingCache(budget), Encodes()
    encode.go.clear()
    with ThreadPoolExecutor(8) as pool:
        lookups = [pool.submit(cache.pin, b"a", encode) for _ in range(8)]
        assert encode.started.wait(DEADLINE)
        encode.go.set()
        pins = [lookup.result(DEADLINE) for lookup in lookups]
    assert len({id(pin.embedding) for pin in pins}) == 1
    for pin in pins:
        pin.release()
    assert encode.calls == 1
    assert (cache.counters.misses, cache.counters.hits) == (1, 7)
    assert cache.held_bytes <= budget


def waiting_for(cache: EmbeddingCache, encode: Encodes, pool: ThreadPoolExecutor, wake: threading.Event | None = None):
    """Starts one thread that encodes and one that waits for its result, and which goes on only after ``wake``."""
    encode.go.clear()
    first = pool.submit(cache.pin, b"a", encode)
    assert encode.started.wait(DEADLINE)
    waiting = threading.Event()
    real = cache._encoding[b"a"].result

    def result():
        waiting.set()
        found = real(DEADLINE)
        assert wake is None or wake.wait(DEADLINE)
        return found

    cache._encoding[b"a"].result = result
    second = pool.submit(cache.pin, b"a", embedding)
    assert waiting.wait(DEADLINE)
    encode.go.set()
    return [first, second]


def test_a_waiting_lookup_gets_an_embedding_that_was_evicted_meanwhile():
    cache, encode, wake = EmbeddingCache(0), Encodes(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first, second = waiting_for(cache, encode, pool, wake)
        pin = first.result(DEADLINE)
        pin.release()
        assert len(cache._entries) == 0
        wake.set()
        with second.result(DEADLINE) as found:
            assert found is pin.embedding
    assert (len(cache._entries), encode.calls) == (0, 1)


def test_a_failed_encode_fails_all_lookups_and_is_not_kept():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes(ValueError("no picture"))
    with ThreadPoolExecutor(2) as pool:
        for lookup in waiting_for(cache, encode, pool):
            with pytest.raises(ValueError, match="no picture"):
                lookup.result(DEADLINE)
    assert (len(cache._entries), cache.held_bytes, encode.calls) == (0, 0, 1)
    with cache.pin(b"a", embedding):
        assert b"a" in cache._entries


def test_an_interrupted_encode_is_repeated_by_a_waiting_lookup():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes(KeyboardInterrupt())
    with ThreadPoolExecutor(2) as pool:
        first, second = waiting_for(cache, encode, pool)
        with pytest.raises(KeyboardInterrupt):
            first.result(DEADLINE)
        with second.result(DEADLINE) as found:
            assert found.num_tokens == 4


def test_a_negative_budget_is_rejected():
    with pytest.raises(ValueError, match="budget"):
        EmbeddingCache(-1)
