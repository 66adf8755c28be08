"""Limits that depend on the machine."""

from __future__ import annotations

import os

import pytest

from embferry.memory.limits import default_max_embedding_bytes
from embferry.protocol.settings import TransferSettings


@pytest.mark.parametrize(("pages", "expected"), [(1 << 30, TransferSettings().max_embedding_bytes), (1000, 4096000)])
def test_the_largest_embedding_fits_the_memory_of_the_machine(
    pages: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    assert default_max_embedding_bytes() == expected
