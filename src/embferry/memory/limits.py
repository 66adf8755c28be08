"""Limits that depend on the machine."""

from __future__ import annotations

import os

from embferry.protocol.settings import DEFAULTS

__all__ = ["default_max_embedding_bytes"]


def default_max_embedding_bytes() -> int:
    """Returns the default of ``TransferSettings.max_embedding_bytes``, or the machine's memory if that is smaller."""
    return min(DEFAULTS.max_embedding_bytes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
