"""The machine a benchmark ran on: hardware, kernel, versions of packages."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec

PACKAGES = {
    "embferry": ("embferry",),
    "numpy": ("numpy",),
    "pyzmq": ("pyzmq",),
    "xxhash": ("xxhash",),
    "safetensors": ("safetensors",),
    "mooncake": ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
    "nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
}
"""Names of packages, and the distributions that may provide each."""
SERVING_PACKAGES = PACKAGES | {name: (name,) for name in ("vllm", "torch", "transformers", "httpx")}

_VERSIONS = """
import importlib.metadata, json, platform, sys
def version(names):
    for name in names:
        try:
            return importlib.metadata.version(name) + (f" ({name})" if len(names) > 1 else "")
        except importlib.metadata.PackageNotFoundError:
            pass
    return ""
packages = json.loads(sys.argv[1])
print(json.dumps({"python": platform.python_version()} | {name: version(names) for name, names in packages.items()}))
"""
_VERSIONS_S = 30.0


class Machine(msgspec.Struct, frozen=True):
    cpu: str
    cores: int
    memory_bytes: int
    kernel: str
    shmem_huge_pages: str
    """The kernel's choice for shared memory, such as ``never``; empty if unknown."""
    versions: dict[str, str]
    """Versions by package; empty if the package is not installed."""


def describe(packages: dict[str, tuple[str, ...]], python: str = sys.executable) -> Machine:
    """Returns a description of this machine, with the versions that the interpreter ``python`` sees.

    Raises:
        ValueError: ``python`` is not a Python interpreter.
    """
    command = [python, "-c", _VERSIONS, json.dumps(packages)]
    try:
        answer = subprocess.run(command, stdout=subprocess.PIPE, timeout=_VERSIONS_S, check=True).stdout
        versions = json.loads(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"{python} is not a Python interpreter: {error}") from error
    return Machine(
        cpu=_line("/proc/cpuinfo", "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=_memory("MemTotal"),
        kernel=f"{platform.system()} {platform.release()}",
        shmem_huge_pages=_chosen("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        versions=versions,
    )


def available_bytes() -> int:
    """Returns how much memory can be allocated without swapping."""
    return _memory("MemAvailable")


def _memory(name: str) -> int:
    return int((_line("/proc/meminfo", name) or "0").split()[0]) * 1024


def _line(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _chosen(path: str) -> str:
    """Returns the bracketed word of a file that lists a kernel setting's choices."""
    try:
        return next((word[1:-1] for word in Path(path).read_text().split() if word.startswith("[")), "")
    except OSError:
        return ""
