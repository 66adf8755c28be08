from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from embferry.engine.cache import EmbeddingCache
from embferry.engine.embedding import Embedding
from embferry.engine.shape import MediaShape, merged_positions

DEADLINE = 10


def embedding(tokens: int = 4) -> Embedding:
    return Embedding(
        MediaShape("image", (1, 2, 2 * tokens)),
        torch.zeros(tokens, 8),
        None,
        torch.zeros(tokens, dtype=torch.int32),
        merged_positions((1, 2, 2 * tokens), 2),
    )


SIZE = embedding().nbytes


class Encodes:
    """An encoder that counts, and can be held up or made to fail."""

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


def test_second_lookup_is_a_hit():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes()
    with cache.lease(b"a", encode) as first, cache.lease(b"a", encode) as second:
        assert first is second
    assert (encode.calls, cache.counters.hits, cache.counters.misses) == (1, 1, 1)
    assert cache.held_bytes == SIZE


def test_least_recently_used_goes_first():
    cache = EmbeddingCache(2 * SIZE)
    a, b, c = keys(3)
    for key in (a, b, a, c):
        cache.lease(key, embedding).release()
    assert (a in cache, b in cache, c in cache) == (True, False, True)
    assert cache.counters.evictions == 1
    assert cache.held_bytes == 2 * SIZE


def test_leased_is_not_evicted():
    cache = EmbeddingCache(SIZE)
    a, b, c = keys(3)
    held = cache.lease(a, embedding)
    again = cache.lease(a, embedding)
    for key in (b, c):
        cache.lease(key, embedding).release()
    assert a in cache
    held.release()
    held.release()
    cache.lease(b, embedding).release()
    assert a in cache, "released twice by one holder, still held by the other"
    again.release()
    cache.lease(c, embedding).release()
    assert a not in cache
    assert cache.held_bytes <= cache.budget_bytes


def test_larger_than_the_budget_is_gone_after_use():
    cache = EmbeddingCache(SIZE - 1)
    with cache.lease(b"a", embedding):
        assert cache.held_bytes == SIZE
    assert (len(cache), cache.held_bytes) == (0, 0)


@pytest.mark.parametrize("budget", [0, 10 * SIZE])
def test_asked_for_at_once_is_encoded_once(budget):
    cache, encode = EmbeddingCache(budget), Encodes()
    encode.go.clear()
    with ThreadPoolExecutor(8) as pool:
        leases = [pool.submit(cache.lease, b"a", encode) for _ in range(8)]
        assert encode.started.wait(DEADLINE)
        encode.go.set()
        held = [lease.result(DEADLINE) for lease in leases]
    assert len({id(lease.embedding) for lease in held}) == 1
    for lease in held:
        lease.release()
    assert encode.calls == 1
    assert (cache.counters.misses, cache.counters.hits) == (1, 7)
    assert cache.held_bytes <= max(budget, 0)


def waiting_for(cache: EmbeddingCache, encode: Encodes, pool: ThreadPoolExecutor, wake: threading.Event | None = None):
    """One thread that encodes, and one that waits for the same and goes on no sooner than ``wake``."""
    encode.go.clear()
    first = pool.submit(cache.lease, b"a", encode)
    assert encode.started.wait(DEADLINE)
    waiting = threading.Event()
    real = cache._encoding[b"a"].result

    def result():
        waiting.set()
        found = real(DEADLINE)
        assert wake is None or wake.wait(DEADLINE)
        return found

    cache._encoding[b"a"].result = result
    second = pool.submit(cache.lease, b"a", embedding)
    assert waiting.wait(DEADLINE)
    encode.go.set()
    return [first, second]


def test_who_waited_gets_it_though_it_was_evicted_meanwhile():
    cache, encode, wake = EmbeddingCache(0), Encodes(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        first, second = waiting_for(cache, encode, pool, wake)
        lease = first.result(DEADLINE)
        lease.release()
        assert len(cache) == 0
        wake.set()
        with second.result(DEADLINE) as found:
            assert found is lease.embedding
    assert (len(cache), encode.calls) == (0, 1)


def test_failed_encode_is_shared_and_not_kept():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes(ValueError("no picture"))
    with ThreadPoolExecutor(2) as pool:
        for lease in waiting_for(cache, encode, pool):
            with pytest.raises(ValueError, match="no picture"):
                lease.result(DEADLINE)
    assert (len(cache), cache.held_bytes, encode.calls) == (0, 0, 1)
    with cache.lease(b"a", embedding):
        assert b"a" in cache


def test_interrupted_encode_is_tried_again_by_those_who_waited():
    cache, encode = EmbeddingCache(10 * SIZE), Encodes(KeyboardInterrupt())
    with ThreadPoolExecutor(2) as pool:
        first, second = waiting_for(cache, encode, pool)
        with pytest.raises(KeyboardInterrupt):
            first.result(DEADLINE)
        with second.result(DEADLINE) as found:
            assert found.num_tokens == 4


def test_budget_must_make_sense():
    with pytest.raises(ValueError, match="budget"):
        EmbeddingCache(-1)
