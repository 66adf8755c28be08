"""The folder of such files, which the language workers of a deployment on one host share.

Its file system should be in memory (``/dev/shm``). The files are locked while a process uses them; those of processes
that have died can be taken over, once or twice, or make room for others. No file is changed or removed without its
lock, and no error of the folder is one of a request: its embedding then lies in ordinary memory, as without a folder.

Everything happens relative to a descriptor of the folder, which must belong to the user of this process and be closed
to all others. Symbolic links in it are never followed.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

from embferry.protocol.errors import shown
from embferry.protocol.layout import Layout
from embferry.trust.occasions import Occasions, more

from .file import KeptFile, Unusable, allocate, claim, describe
from .form import KEY_CHARACTERS, Head

log = logging.getLogger(__name__)

MAX_TAKEN = 2
"""How often a file is taken over: if its embedding is what kills the workers, it does not do so for ever."""
FREE_SHARE = 8
"""One part in so many of the file system stays free for its other users."""
_NAME = re.compile(rf"[0-9a-f]{{{KEY_CHARACTERS}}}-[0-9a-f]{{16}}-[0-{MAX_TAKEN}]\Z")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Found(NamedTuple):
    """A file of the folder: when it was last written or taken over (nanoseconds since the epoch), name, size."""

    used_ns: int
    name: str
    nbytes: int


class KeptFolder:
    """The folder, for one process. Any thread may call the methods, none of which raises.

    Args:
        path: Made if there is none; its parent must exist.
        max_bytes: Bytes of all files of processes that have died. The least recently used go first.
        layout: The fields of a token.

    Attributes:
        dropped: Files of processes that have died and that were dropped, by reason.
        unkept: Embeddings that were received into ordinary memory because of an error.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int, layout: Layout) -> None:
        self._path, self._max_bytes, self._layout = Path(path), max_bytes, layout
        self.dropped = Counter({"room": 0, "unusable": 0})
        self.unkept = 0
        self._lock = threading.Lock()  # guards what is above and what follows; nothing else is taken with it held
        self._files: dict[str, KeptFile] = {}  # those in use, by name
        self._occasions = Occasions()

    def make(self, content_digest: bytes, total_tokens: int) -> KeptFile | None:
        """Returns a new file for an embedding that is about to arrive; None: use ordinary memory."""
        head = Head(self._layout, content_digest, total_tokens)
        try:
            with self._folder(make=True) as folder:
                self._make_room(folder, head.size)
                return self._make(folder, head)
        except (OSError, ValueError) as error:
            self._failed(error, unkept=1)
            return None

    def take(self, content_digest: bytes, total_tokens: int) -> KeptFile | None:
        """Takes over the file of a process that has died in the middle of receiving this embedding; None: none has."""
        head = Head(self._layout, content_digest, total_tokens)
        try:
            with self._folder() as folder:
                names = sorted(name for name in os.listdir(folder) if name.startswith(head.key) and _NAME.match(name))
                return next((file for name in names if (file := self._take(folder, name, head)) is not None), None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._failed(error)
            return None

    def close(self) -> None:
        """Removes every file that this process still uses."""
        with self._lock:
            files = list(self._files.values())
        for file in files:
            file.discard()

    # One file

    def _make(self, folder: int, head: Head) -> KeptFile:
        """Makes a file. It has no name before it is locked and complete, but for what will arrive. Raises OSError."""
        fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            allocate(fd, head.size)
            os.pwrite(fd, head.encoded, 0)
            name = f"{head.key}-{secrets.token_hex(8)}-0"
            file = KeptFile(fd, head, partial(self._forget, name))
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
        except BaseException:
            os.close(fd)
            raise
        with self._lock:
            self._files[name] = file
        return file

    def _take(self, folder: int, name: str, head: Head) -> KeptFile | None:
        """Takes a file over, or removes it if it cannot be used."""
        fd = None
        try:
            if (fd := claim(folder, name)) is None:
                return None
            name = _taken_once_more(folder, name)
            return self._adopt(fd, name, head)
        except (Unusable, OSError, ValueError) as error:
            if fd is not None or isinstance(error, Unusable):
                self._drop(folder, name, "unusable", error)
            if fd is not None:
                os.close(fd)
            return None

    def _adopt(self, fd: int, name: str, head: Head) -> KeptFile:
        """Returns a file that was claimed, once it is verified.

        Raises:
            Unusable: It cannot be used.
            OSError: It cannot be read or mapped.
        """
        if not (records := describe(fd, head)):
            raise Unusable("nothing has arrived in it")
        allocate(fd, head.size)
        os.utime(fd)
        file = KeptFile(fd, head, partial(self._forget, name), records)
        if not all(record.matches(self._layout, file.arrays) for record in records):
            raise Unusable("its rows are not those that arrived")
        with self._lock:
            self._files[name] = file
        return file

    def _forget(self, name: str) -> None:
        with suppress(OSError), self._folder() as folder:
            os.unlink(name, dir_fd=folder)
        with self._lock:
            self._files.pop(name, None)

    # Room

    def _make_room(self, folder: int, size: int) -> None:
        """Drops files of processes that have died, beyond the bound.

        Raises:
            OSError: There is no room for ``size`` more bytes.
        """
        self._trim(folder)
        whole = os.fstatvfs(folder)
        if (whole.f_bavail - whole.f_blocks // FREE_SHARE) * whole.f_frsize < size:
            raise OSError(errno.ENOSPC, f"no room for {size} bytes beside the eighth that stays free", str(self._path))

    def _trim(self, folder: int) -> None:
        with self._lock:
            own = set(self._files)
        others = [found for found in _look_through(folder) if found.name not in own]
        if sum(found.nbytes for found in others) <= self._max_bytes:
            return
        left = self._max_bytes
        for found in sorted(others, reverse=True):  # the most recently used first
            fd = None
            try:
                if (fd := claim(folder, found.name)) is None:
                    continue  # its process lives
                left -= found.nbytes
                if left < 0:
                    self._drop(folder, found.name, "room")
            except Unusable as error:
                self._drop(folder, found.name, "unusable", error)
            finally:
                if fd is not None:
                    os.close(fd)

    def _drop(self, folder: int, name: str, reason: str, error: Exception | None = None) -> None:
        """Removes a file that no process uses."""
        with suppress(OSError):
            os.unlink(name, dir_fd=folder)
        with self._lock:
            self.dropped[reason] += 1
            if (count := self._occasions.count(reason)) is not None:
                why = "there are too many" if error is None else shown(error)
                text = "what a killed process had received is dropped (%s): %s%s"
                log.warning(text, name, why, more(count))

    def _failed(self, error: Exception, unkept: int = 0) -> None:
        """Logs an error of the folder, and counts the embeddings that are not kept because of it."""
        with self._lock:
            self.unkept += unkept
            if (count := self._occasions.count("unkept")) is not None:
                text = "embeddings that arrive are not kept for the case that this process is killed: %s%s"
                log.warning(text, shown(error), more(count))

    @contextmanager
    def _folder(self, *, make: bool = False) -> Iterator[int]:
        """Opens the folder, and may make it if it is not there. Raises OSError."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags)
        except FileNotFoundError:
            if not make:
                raise
            with suppress(FileExistsError):  # another process was faster
                os.mkdir(self._path, 0o700)
            fd = os.open(self._path, flags)
        try:
            found = os.fstat(fd)
            if found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
                why = "the folder must belong to the user of this process, with mode 700"
                raise PermissionError(errno.EPERM, why, str(self._path))
            yield fd
        finally:
            os.close(fd)


def _taken_once_more(folder: int, name: str) -> str:
    """Counts in the name of a file that it is taken over. Returns the new name.

    Raises:
        Unusable: It has been taken over too often.
        OSError: It cannot be renamed.
    """
    if (taken := int(name[-1])) >= MAX_TAKEN:
        raise Unusable(f"{taken} processes have taken it over, and have died")
    new = f"{name[:-1]}{taken + 1}"
    os.rename(name, new, src_dir_fd=folder, dst_dir_fd=folder)
    return new


def _look_through(folder: int) -> Iterator[Found]:
    """Yields the files of the folder. Others in there are nothing of ours."""
    with os.scandir(folder) as entries:
        for one in entries:
            if _NAME.match(one.name):
                with suppress(OSError):  # it has been removed meanwhile
                    found = one.stat(follow_symlinks=False)
                    yield Found(found.st_mtime_ns, one.name, found.st_size)
