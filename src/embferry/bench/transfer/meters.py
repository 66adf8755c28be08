"""CPU time and memory of this process."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

_PROC = Path("/proc/self")


def cpu_seconds() -> float:
    """Returns user and system time of all threads of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def reset_peak() -> None:
    """Resets the peak of resident memory, ``VmHWM`` (proc(5)); a system that forbids it leaves the peak so far."""
    with suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def memory(name: str) -> int:
    """Returns a line of ``/proc/self/status`` such as ``VmHWM`` or ``VmRSS``, bytes, with mapped shared memory."""
    for line in (_PROC / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"the kernel does not report {name}")
