"""The receive pool: resumes of transfers that do not fit, and how much is enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.plan.pool import Pool, enough


@pytest.mark.parametrize(
    ("tokens", "arriving", "resumes"),
    [(1, 0, 0), (64, 0, 0), (65, 0, 1), (640, 0, 9), (64, 1, 1), (48, 16, 0), (48, 17, 1), (32, 64, 1), (32, 1000, 1)],
)
def test_a_transfer_is_resumed_until_it_has_fitted(tokens: int, arriving: int, resumes: int) -> None:
    assert Pool(4, 16).resumes(tokens, arriving) == resumes


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 64), st.integers(1, 256))
def test_an_embedding_that_does_not_fit_is_resumed(tokens: int, arriving: int, blocks: int, size: int) -> None:
    pool = Pool(blocks, size)
    resumes = pool.resumes(tokens, arriving)
    assert (resumes > 0) or (tokens <= pool.tokens)
    assert resumes >= -(-tokens // pool.tokens) - 1
    assert Pool(blocks + 1, size).resumes(tokens, arriving) <= resumes
    assert pool.resumes(tokens, arriving + size) >= resumes
    assert pool.resumes(tokens + 1, arriving) >= resumes


@given(st.integers(1, 100_000), st.integers(1, 1024))
def test_enough_is_enough_and_no_block_more(tokens: int, size: int) -> None:
    pool = enough(tokens, size)
    assert pool.resumes(tokens, 0) == 0
    assert pool.blocks == 1 or Pool(pool.blocks - 1, size).resumes(tokens, 0) > 0
