"""A filter of system calls (seccomp) for a process that decodes: it may start threads, but no process or program.

A limit on processes would count threads too, and decoders of HEIC need one each.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_SET_FILTER, _MODE = 22, 2
_LOAD, _EQUAL, _AT_LEAST, _HAS_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOWED, _REFUSED = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FLAGS_AT = 0, 4, 16
"""Places in ``struct seccomp_data``; the last is the lower half of the first argument."""
_THREAD = 0x10000
"""The flag of ``clone`` for a thread (CLONE_THREAD)."""
_CLONE3 = 435
"""Its flags are in memory, which a filter cannot read; the C library takes ``clone`` if it is not there."""
_X32 = 0x40000000
"""The numbers of another interface to the same kernel begin here."""
_ARCHITECTURES = {
    "x86_64": (0xC000003E, 56, (57, 58, 59, 322)),
    "aarch64": (0xC00000B7, 220, (221, 281)),
}
"""For each machine: its number, ``clone``, and ``fork``, ``vfork``, ``execve``, ``execveat`` as far as it has them."""


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def forbid_processes() -> bool:
    """Forbids this thread, and those that it starts, to start processes and programs. Needs NO_NEW_PRIVS.

    Returns:
        Whether it could; not on other machines than x86-64 and ARM64, nor where the kernel has no filters.
    """
    if platform.machine() not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    steps = _filter(*_ARCHITECTURES[platform.machine()])
    program = _Program(len(steps), b"".join(struct.pack("=HBBI", *step) for step in steps))
    libc = ctypes.CDLL(None, use_errno=True)
    unused = ctypes.c_ulong(0)
    return int(libc.prctl(_SET_FILTER, ctypes.c_ulong(_MODE), ctypes.byref(program), unused, unused)) == 0


def _filter(machine: int, clone: int, others: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Returns instructions: what to do, how many to skip if it holds and if not, and a value."""
    refuse = (_RETURN, 0, 0, _REFUSED | errno.EPERM)
    return [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, machine),
        refuse,
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        refuse,
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _REFUSED | errno.ENOSYS),
        *[step for number in others for step in ((_EQUAL, 0, 1, number), refuse)],
        (_EQUAL, 0, 3, clone),
        (_LOAD, 0, 0, _FLAGS_AT),
        (_HAS_BITS, 1, 0, _THREAD),
        refuse,
        (_RETURN, 0, 0, _ALLOWED),
    ]
