"""Confinement of a process that decodes, so that a malicious file that takes it over reaches nothing else.

Best effort: each step does what the kernel and the container allow. The process keeps its open socket and may read
Python's own files, because modules are imported when they are first needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sysconfig
from collections.abc import Iterable

_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000
_NO_NEW_PRIVILEGES = 38
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_ONLY_VERSION, _PATH_BENEATH = 1, 1
_READ = 1 << 2 | 1 << 3
"""Landlock's rights to read files and to list folders."""
_RIGHTS_ON_FILES = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""The number of Landlock's rights on files, by its version; later versions have as many as the last one here."""
_CONNECTIONS_FROM, _SCOPES_FROM = 4, 6
"""Landlock's versions that know TCP; signals and abstract sockets."""
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("connections", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def confine(folders: Iterable[str] = ()) -> None:
    """Takes rights from this process, for good. Must be called before it has a second thread.

    Args:
        folders: may be read beside those of Python.
    """
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    leave_network()
    if (version := landlock_version()) > 0:
        paths = sysconfig.get_paths()
        _restrict_files(version, {*folders, *(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))})


def leave_network() -> bool:
    """Moves this process into a network of its own, without any interface that is up. Returns whether it could."""
    # With a user namespace the process loses the capabilities of its user, so that comes second.
    return not (_LIBC.unshare(_NEW_NETWORK) and _LIBC.unshare(_NEW_USER | _NEW_NETWORK))


def landlock_version() -> int:
    """Returns the version of Landlock that the kernel has; 0 or less if it has none."""
    return int(_LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ONLY_VERSION)))


def _restrict_files(version: int, folders: Iterable[str]) -> None:
    """Leaves the right to read some folders, and takes all others that Landlock knows."""
    ruleset = _Ruleset(
        files=(1 << _RIGHTS_ON_FILES[min(version, max(_RIGHTS_ON_FILES))]) - 1,
        connections=0b11 if version >= _CONNECTIONS_FROM else 0,
        scopes=0b11 if version >= _SCOPES_FROM else 0,
    )
    rules = _LIBC.syscall(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)
    if rules < 0:
        return
    try:
        for folder in folders:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                _allow_reading(rules, folder)
        _LIBC.syscall(_RESTRICT_SELF, rules, 0)
    finally:
        os.close(rules)


def _allow_reading(rules: int, folder: str) -> None:
    opened = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        beneath = _Beneath(rights=_READ, folder=opened)
        _LIBC.syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(beneath), 0)
    finally:
        os.close(opened)
