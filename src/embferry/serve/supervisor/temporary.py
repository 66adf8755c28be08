"""Temporary folders of deployments.

Instances of vLLM leave sockets and other files behind; language workers have their embeddings under way in one.

The supervisor holds a lock on such a folder, and so does the process beside each instance of vLLM, which has a folder
of its own in there. The last of them removes it, and the next supervisor, if all were killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import secrets
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "embferry-vllm-"
KEPT_PREFIX = "embferry-kept-"
ID_BYTES = 4
MEMORY = Path("/dev/shm")
"""The file system in memory that Linux has."""
LOCK = ".in-use"
MAX_BYTES = 70
"""Bytes of the path of an instance's folder. A Unix socket has 107, of which vLLM needs 37 for the name in there."""
NAME_BYTES = 16
"""Bytes of these for the name of an instance."""
MIN_AGE_SECONDS = 60.0
"""A folder younger than this may not have been locked yet."""


def new_root() -> Path:
    """Returns the path of a folder for a deployment, which :func:`hold` makes: short enough for sockets in there."""
    places = [os.environ.get("VLLM_RPC_BASE_PATH", ""), tempfile.gettempdir(), "/tmp"]
    name = PREFIX + secrets.token_hex(ID_BYTES)
    room = MAX_BYTES - NAME_BYTES - len(name) - 1
    fit = [place for place in places if place and len(os.fsencode(place)) <= room and os.access(place, os.W_OK)]
    return Path(fit[0] if fit else tempfile.gettempdir(), name)


def new_kept_root() -> Path | None:
    """Returns the path of a folder in memory for the embeddings of a deployment; None: there is no such memory."""
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return None
    return MEMORY / (KEPT_PREFIX + secrets.token_hex(ID_BYTES))


def hold(root: Path) -> int:
    """Makes the folder of a deployment if it is not there, and locks it. Returns the lock's descriptor."""
    root.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def release(root: Path, lock: int) -> None:
    """Unlocks the folder of a deployment, and removes it if no process holds it any more."""
    os.close(lock)
    _remove_unheld(root)


def remove(folder: Path) -> None:
    """Removes the folder of an instance, all of whose processes have ended."""
    shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(beside: Path) -> None:
    """Removes the folders of earlier deployments of this user, of the same kind, all of whose processes were killed."""
    prefix = beside.name[: -2 * ID_BYTES]
    for root in beside.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            found = root.lstat()
            is_known = re.fullmatch("[0-9a-f]{8}", root.name.removeprefix(prefix)) and not root.is_symlink()
            if is_known and found.st_uid == os.getuid() and time.time() - found.st_mtime > MIN_AGE_SECONDS:
                _remove_unheld(root)


def _remove_unheld(root: Path) -> None:
    with contextlib.suppress(OSError):  # it is held, or has been removed
        lock = os.open(root / LOCK, os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(root, ignore_errors=True)
        finally:
            os.close(lock)


def environ(folder: Path) -> dict[str, str]:
    """Returns the variables with which vLLM puts its files into a folder, but for a cache that outlives it."""
    try:
        user = re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # a container without a name for it
        user = str(os.getuid())
    cache = str(Path(tempfile.gettempdir(), f"torchinductor_{user}"))
    return {
        "TMPDIR": str(folder),
        "VLLM_RPC_BASE_PATH": str(folder),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", cache),
    }
