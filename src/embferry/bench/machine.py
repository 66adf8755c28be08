"""Where a run was made, and with what."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from .results import Machine

PACKAGES = {
    "embferry": ("embferry",),
    "numpy": ("numpy",),
    "pyzmq": ("pyzmq",),
    "xxhash": ("xxhash",),
    "safetensors": ("safetensors",),
    "mooncake": ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
    "nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
}
"""What a version is shown as, and the distributions that may bring it."""


def describe() -> Machine:
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name"),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        kernel=f"{platform.system()} {platform.release()}",
        shmem_huge_pages=_chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        versions={"python": platform.python_version()} | {name: _version(names) for name, names in PACKAGES.items()},
    )


def available_bytes() -> int:
    """Memory that can be used without anything being moved out for it."""
    return int(_field("/proc/meminfo", "MemAvailable").split()[0]) * 1024


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0" if path.endswith("meminfo") else platform.machine()


def _chosen(path: str) -> str:
    """The bracketed one of the kernel's choices, or nothing."""
    try:
        return next((word[1:-1] for word in Path(path).read_text().split() if word.startswith("[")), "")
    except OSError:
        return ""


def _version(names: tuple[str, ...]) -> str:
    for name in names:
        try:
            return f"{importlib.metadata.version(name)}" + (f" ({name})" if len(names) > 1 else "")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
