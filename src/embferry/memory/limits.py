"""Limits that depend on the machine."""

from __future__ import annotations

import os
from pathlib import Path

from embferry.protocol.settings import DEFAULTS

__all__ = ["default_max_embedding_bytes", "machine_memory_bytes"]

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""The limit of a container (cgroup v2), as it is seen from inside; it holds "max" if there is none."""


def machine_memory_bytes() -> int:
    """Returns the memory of the machine, or of the container if that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() and int(limit) else machine


def default_max_embedding_bytes() -> int:
    """Returns the default of ``TransferSettings.max_embedding_bytes``, or the machine's memory if that is smaller."""
    return min(DEFAULTS.max_embedding_bytes, machine_memory_bytes())
