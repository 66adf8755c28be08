"""Every process that this one has started, at any depth: found in ``/proc``, and ended.

A process may leave the group and the session of its parent, and it outlives the parent. It cannot leave the tree: when
its parent ends, the kernel gives it to the nearest ancestor that adopts (prctl(2), PR_SET_CHILD_SUBREAPER).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05
KILL_SECONDS = 2.0
"""Seconds that the kernel gets for the end of processes that were killed."""


class Descendant(NamedTuple):
    """A process. ``is_zombie``: it has ended, and its parent has not yet taken note of that."""

    pid: int
    parent: int
    is_zombie: bool


def adopt_orphans() -> None:
    """Makes this process the parent of all its descendants whose own parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(spared: Collection[int] = ()) -> list[Descendant]:
    """Returns the descendants of this process, without the children ``spared`` and what those have started."""
    children: dict[int, list[Descendant]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            state, parent = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()[:2]
            children.setdefault(int(parent), []).append(Descendant(int(name), int(parent), state in "ZX"))
    found = [one for one in children.get(os.getpid(), ()) if one.pid not in spared]
    for one in found:  # it grows meanwhile
        found += children.get(one.pid, ())
    return found


def reap_adopted(own: int) -> None:
    """Takes note of adopted children that have ended. ``own``: the child for which ``subprocess`` does that."""
    with contextlib.suppress(ChildProcessError):  # there is no child
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != own:
            os.waitpid(ended.si_pid, 0)


def end_descendants(asked_seconds: float, deadline: float, spared: Callable[[], Collection[int]] = frozenset) -> None:
    """Ends all descendants of this process: by SIGTERM, then by SIGKILL, and Python's resource trackers last.

    A resource tracker ignores SIGTERM. It ends by itself after the processes it works for, and removes the shared
    memory that they have left; of vLLM, that is a ring of 160 MB.

    Args:
        asked_seconds: between SIGTERM and SIGKILL; 0 for SIGKILL at once.
        deadline: of the trackers, in monotonic seconds. One that is just starting may need some.
        spared: returns the children that are left alone, with what they have started.
    """
    asked_until = time.monotonic() + asked_seconds
    if asked_seconds:
        _signal(_split(_left(spared))[0], signal.SIGTERM)
    while left := _left(spared):
        others, trackers = _split(left)
        now = time.monotonic()
        if not others or now >= asked_until:
            _signal(others, signal.SIGKILL)
        if not others and now >= deadline:
            _signal(trackers, signal.SIGKILL)
        if now >= max(asked_until, deadline) + KILL_SECONDS:  # the kernel is busy with one of them
            return
        time.sleep(POLL_SECONDS)


def _left(spared: Callable[[], Collection[int]]) -> list[int]:
    """Returns the descendants that run. Takes note of the others."""
    before = spared()
    seen = descendants(before)
    own = {*before, *spared()}  # one that was started meanwhile
    running = []
    for one in seen:
        if one.pid in own:
            continue
        if not one.is_zombie:
            running.append(one.pid)
        elif one.parent == os.getpid():
            with contextlib.suppress(ChildProcessError):
                os.waitpid(one.pid, os.WNOHANG)
    return running


def _split(pids: list[int]) -> tuple[list[int], list[int]]:
    """Returns the other processes, and the resource trackers."""
    trackers = [pid for pid in pids if _is_resource_tracker(pid)]
    return [pid for pid in pids if pid not in trackers], trackers


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_resource_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False
