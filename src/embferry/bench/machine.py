"""The machine a benchmark ran on: hardware, kernel, versions of packages."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import msgspec

PACKAGES = {name: (name,) for name in ("embferry", "numpy", "pyzmq", "xxhash", "safetensors")} | {
    "mooncake": ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
    "nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
}
"""Names of packages, and the distributions that may provide each."""
SERVING_PACKAGES = PACKAGES | {name: (name,) for name in ("vllm", "sglang", "torch", "transformers", "httpx")}

_VERSIONS = """
import importlib.metadata as metadata, json, platform, sys
def version(names):
    for name in names:
        try:
            return metadata.version(name) + (f" ({name})" if len(names) > 1 else "")
        except metadata.PackageNotFoundError:
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

    def extends(self, other: Machine) -> bool:
        """Returns whether this is the same machine with the same versions, apart from packages that were added."""
        had = {name: version for name, version in other.versions.items() if version}
        same = msgspec.structs.replace(other, versions=self.versions) == self
        return same and all(self.versions.get(name) == version for name, version in had.items())


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
    try:
        choices = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text().split()
    except OSError:
        choices = []
    return Machine(
        cpu=line("/proc/cpuinfo", "model name") or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=size("/proc/meminfo", "MemTotal"),
        kernel=f"{platform.system()} {platform.release()}",
        shmem_huge_pages=next((word[1:-1] for word in choices if word.startswith("[")), ""),
        versions=versions,
    )


def line(path: str, name: str) -> str:
    """Returns what a file with lines such as ``MemTotal: 8000000 kB`` says about ``name``; empty if nothing."""
    parts = (text.partition(":") for text in Path(path).read_text().splitlines())
    return next((value.strip() for key, _, value in parts if key.strip() == name), "")


def size(path: str, name: str) -> int:
    """Returns the same in bytes, from KiB; 0 if the file does not say."""
    return int((line(path, name) or "0").split()[0]) * 1024


def available_bytes() -> int:
    """Returns how much memory can be allocated without swapping."""
    return size("/proc/meminfo", "MemAvailable")
