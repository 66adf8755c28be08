"""Child processes that never outlive the benchmark.

Run as a program with the arguments ``PARENT SIGNAL PROGRAM [ARGUMENT …]``, this file runs a program that gets SIGNAL
when the process PARENT ends, even if that is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PR_SET_PDEATHSIG = 1
SHARED = "/dev/shm"


class Child:
    """A running program and its own children, a process group: Ctrl-C reaches only the benchmark, which ends them.

    Args:
        command: the program and its arguments.
        log: the file for its output, open for reading and writing; closed when the program has ended.
        orphaned: the signal that it gets when the benchmark is killed.
        more: arguments for :class:`subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str], log: IO[bytes], orphaned: signal.Signals, **more: Any) -> None:
        launch = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(int(orphaned))]
        output: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        self._log, self._said = log, list[str]()
        self.process = subprocess.Popen([*launch, *command], start_new_session=True, **output, **more)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def lines(self) -> list[str]:
        """Returns the lines that the program has printed."""
        if not self._log.closed:
            self._log.seek(0)
            self._said = self._log.read().decode(errors="replace").strip().splitlines()
        return self._said

    def end(self, within_s: float) -> None:
        """Waits until the program has ended, then kills what is left of it."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        self.kill()

    def kill(self) -> None:
        """Sends SIGKILL to the program and its children, and removes the shared memory that they leave behind."""
        left = _mapped(self.process.pid)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.lines()
        self._log.close()
        for entry in os.scandir(SHARED):
            if entry.inode() in left:
                with suppress(OSError):  # already removed
                    os.unlink(entry.path)


def cpu_seconds(groups: Collection[int]) -> float:
    """Returns the CPU time, user's and kernel's, of all threads of the living processes in these process groups."""
    return sum(int(ticks) for _, stat in _members(groups) for ticks in stat[11:13]) / os.sysconf("SC_CLK_TCK")


def _mapped(group: int) -> set[int]:
    """Returns the inodes of shared memory that the processes of a group have mapped.

    The names in ``/proc/…/maps`` are of no use, because the C library renames semaphores.
    """
    found: set[int] = set()
    for process, _ in _members((group,)):
        with suppress(OSError):  # it has ended
            lines = (process / "maps").read_text().splitlines()
            found.update(int(line.split()[4]) for line in lines if f" {SHARED}/" in line)
    return found


def _members(groups: Collection[int]) -> Iterator[tuple[Path, list[str]]]:
    """Yields the folder in ``/proc`` of each process in the groups, and the words of its ``stat`` after its name."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            # The name stands in parentheses and may have spaces.
            stat = (process / "stat").read_text().rpartition(")")[2].split()
            if int(stat[2]) in groups:
                yield process, stat


if __name__ == "__main__":
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sys.argv[2]), 0, 0, 0):
        sys.exit("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    os.execvp(sys.argv[3], sys.argv[3:])
