"""A folder of embeddings, one file each, which several processes use at once, also over a shared file system.

No process locks another one out. A file appears complete, by renaming it, and is never changed afterwards but for its
time of last use, which is its modification time. A reader holds the file open, so it may be evicted meanwhile. A
reader verifies each file: one that is half-written, or holds no embedding, is removed and counts as missing.

Everything happens relative to a descriptor of the folder, which must belong to the user of this process and be closed
to all others. Symbolic links in it are never followed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from .contract import Accept, TooLarge, verify
from .entry import MAX_HEAD, Damaged, Entry, checked, digest_of, parse

SUFFIX = ".safetensors"
MAX_FILES = 1 << 16
"""Files in a folder at most, so that looking through it takes a fraction of a second."""
SCAN_S = 1.0
"""Shortest time between two looks through the folder, for what other processes have written and used."""
SCAN_SHARE = 50
"""Looking through the folder takes at most one part in so many of a writer's time."""
LEFT_OVER_S = 3600.0
"""Age from which a temporary file belongs to a process that was killed."""
PIECE = 8 << 20
"""Bytes that one call of the system reads or writes at most."""
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors\Z")
_TEMPORARY = re.compile(r"writing-[0-9a-f]{32}\Z")
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class Kept(NamedTuple):
    """One file of the folder: its name, the time of its last use (nanoseconds since the epoch) and its length."""

    name: str
    used_ns: int
    nbytes: int

    @property
    def key(self) -> str:
        return self.name.removesuffix(SUFFIX)


class FolderStore:
    """The folder, for one process. Any thread may call the methods.

    Attributes:
        nbytes: Bytes in the folder, as far as this process knows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int,
        *,
        max_files: int = MAX_FILES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Makes the folder if there is none; its parent must exist.

        Args:
            path: Its path, which may be a symbolic link.
            max_bytes: Bytes of all files together. The least recently used make room for new ones.
            max_files: Number of files.
            clock: Monotonic seconds.

        Raises:
            OSError: It cannot be made or opened, belongs to another user, or others may use it.
        """
        self._path, self._max_bytes, self._max_files, self._clock = os.fspath(path), max_bytes, max_files, clock
        self._lock = threading.Lock()  # one writer at a time; guards what follows
        self._oldest: deque[Kept] = deque()  # the files as they were seen last, the least recently used first
        self._scan_at = -float("inf")
        self.nbytes = 0
        with self._folder() as folder, self._lock, suppress(OSError):
            self._scan(folder)

    def read(self, key: str, accept: Accept) -> Entry | None:
        """See :meth:`Store.read`. A file that was read counts as used now."""
        name = key + SUFFIX
        with self._folder() as folder:
            try:
                fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                self._remove(folder, name)
                raise Damaged("it is a symbolic link") from None
            try:
                entry = _read(fd, key, accept)
                with suppress(OSError):  # a folder that is only read has no order of use
                    os.utime(fd)
                return entry
            except Damaged:
                self._remove(folder, name, fd)
                raise
            finally:
                os.close(fd)

    def write(self, entry: Entry, data: memoryview) -> int:
        """See :meth:`Store.write`. The file appears with all of its bytes on disk."""
        head = checked(entry).head()
        size, name = len(head) + entry.nbytes, entry.key + SUFFIX
        if size > self._max_bytes:
            raise TooLarge(f"an embedding of {size} bytes; the folder may have {self._max_bytes}")
        with self._folder() as folder, self._lock:
            if _use(folder, name):
                return 0
            self._make_room(folder, size)
            _write(folder, name, head, data)
            self._oldest.append(Kept(name, time.time_ns(), size))
            self.nbytes += size
            return size

    def close(self) -> None:
        """Does nothing: between two calls the folder is not open."""

    def files(self) -> list[Kept]:
        """Returns all files of embeddings, the least recently used first. Raises OSError."""
        with self._folder() as folder:
            return sorted((kept for kept in _look_through(folder) if _NAME.match(kept.name)), key=_used)

    def describe(self, key: str) -> Entry:
        """Returns what the head of a file says, without reading the rest.

        Raises:
            Damaged: It is not the file of an embedding.
            OSError: It cannot be read.
        """
        with self._opened(key) as fd:
            return _head(fd, key)[0]

    def check(self, key: str) -> Entry:
        """Reads a file, which does not count as a use, and returns what it is. Errors are those of :meth:`describe`."""
        with self._opened(key) as fd:
            entry, length = _head(fd, key)
            found = digest_of(entry.layout, entry.tokens, lambda at, end: _pieces(fd, length + at, length + end))
            if found != entry.digest:
                raise Damaged("its bytes do not have the digest in its head")
            return entry

    def remove(self, key: str) -> bool:
        """Removes a file. Returns whether there was one. Raises OSError."""
        with self._folder() as folder:
            try:
                os.unlink(key + SUFFIX, dir_fd=folder)
            except FileNotFoundError:
                return False
            return True

    def prune(self, max_bytes: int) -> list[Kept]:
        """Removes the least recently used files until the rest has at most ``max_bytes``. Returns the removed ones."""
        files = self.files()
        total, removed = sum(kept.nbytes for kept in files), []
        for kept in files:
            if total <= max_bytes:
                break
            self.remove(kept.key)
            total -= kept.nbytes
            removed.append(kept)
        return removed

    @contextmanager
    def _folder(self) -> Iterator[int]:
        """Opens the folder, and makes it again if it has vanished. Raises OSError."""
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        try:
            fd = os.open(self._path, flags)
        except FileNotFoundError:
            with suppress(FileExistsError):  # another process was faster
                os.mkdir(self._path, 0o700)
            fd = os.open(self._path, flags)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "the folder belongs to another user", self._path)
            if stat.S_IMODE(status.st_mode) & _OTHERS:
                raise PermissionError(errno.EPERM, "others may use the folder; its mode must be 700", self._path)
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _opened(self, key: str) -> Iterator[int]:
        with self._folder() as folder:
            fd = os.open(key + SUFFIX, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            try:
                yield fd
            finally:
                os.close(fd)

    def _remove(self, folder: int, name: str, fd: int | None = None) -> None:
        """Removes what cannot be used, unless another process has put a new file in its place since ``fd`` was opened.

        If that fails, the file stays and is missing to every reader.
        """
        with suppress(OSError):
            there = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if fd is None or os.path.samestat(os.fstat(fd), there):
                os.unlink(name, dir_fd=folder)

    def _make_room(self, folder: int, size: int) -> None:
        """Evicts until ``size`` more bytes and one more file fit. Raises OSError."""
        if self._clock() >= self._scan_at:
            self._scan(folder)
        looks = 2 * len(self._oldest)
        while self.nbytes + size > self._max_bytes or len(self._oldest) >= self._max_files:
            looks -= 1
            if looks < 0 or not self._oldest:
                raise OSError(errno.ENOSPC, "all files of the folder are in use, or are being written", self._path)
            self._evict(folder, self._oldest.popleft())

    def _evict(self, folder: int, kept: Kept) -> None:
        try:
            now = os.stat(kept.name, dir_fd=folder, follow_symlinks=False)
            if now.st_mtime_ns > kept.used_ns:  # used since, by some process
                self._oldest.append(kept._replace(used_ns=now.st_mtime_ns))
                return
            os.unlink(kept.name, dir_fd=folder)
        except FileNotFoundError:
            pass  # another process has evicted it
        except OSError:
            self._oldest.append(kept)
            raise
        self.nbytes -= kept.nbytes

    def _scan(self, folder: int) -> None:
        """Looks through the folder, and removes what processes that were killed have left."""
        began, now = self._clock(), time.time()
        found: list[Kept] = []
        total = 0
        for kept in _look_through(folder):
            if _TEMPORARY.match(kept.name) and now - kept.used_ns / 1e9 > LEFT_OVER_S:
                with suppress(OSError):
                    os.unlink(kept.name, dir_fd=folder)
                    continue
            total += kept.nbytes
            if _NAME.match(kept.name):
                found.append(kept)
        self._oldest, self.nbytes = deque(sorted(found, key=_used)), total
        ended = self._clock()
        self._scan_at = ended + max(SCAN_S, SCAN_SHARE * (ended - began))


def _used(kept: Kept) -> int:
    return kept.used_ns


def _look_through(folder: int) -> Iterator[Kept]:
    """Yields the files of embeddings and the temporary ones. Other files in the folder are nothing of ours."""
    with os.scandir(folder) as found:
        for one in found:
            if not (_NAME.match(one.name) or _TEMPORARY.match(one.name)):
                continue
            try:
                status = one.stat(follow_symlinks=False)
            except OSError:  # evicted meanwhile
                continue
            if stat.S_ISREG(status.st_mode):
                yield Kept(one.name, status.st_mtime_ns, status.st_size)


def _use(folder: int, name: str) -> bool:
    """Returns whether the file is there, and counts as used now if it is."""
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(there.st_mode):
        return False
    with suppress(OSError):
        os.utime(name, dir_fd=folder, follow_symlinks=False)
    return True


def _head(fd: int, key: str) -> tuple[Entry, int]:
    """Returns the entry of an open file and the length of its head. Raises Damaged, OSError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise Damaged("it is no file of this user")
    start = os.pread(fd, MAX_HEAD, 0)
    entry, length = parse(start, status.st_size)
    if entry.key != key:
        raise Damaged("its head has another key than its name")
    return entry, length


def _read(fd: int, key: str, accept: Accept) -> Entry:
    """Reads and verifies an open file. It is never mapped: another process could cut it short under us."""
    entry, at = _head(fd, key)
    room = accept(entry)
    filled = 0
    while filled < entry.nbytes:
        count = os.preadv(fd, [room[filled : filled + PIECE]], at + filled)
        if not count:
            raise Damaged("it was cut short while it was read")
        filled += count
    verify(entry, room)
    return entry


def _pieces(fd: int, at: int, end: int) -> Iterator[bytes]:
    while at < end:
        piece = os.pread(fd, min(PIECE, end - at), at)
        if not piece:
            raise Damaged("it was cut short while it was read")
        yield piece
        at += len(piece)


def _write(folder: int, name: str, head: bytes, data: memoryview) -> None:
    """Writes a file under a temporary name, and renames it once it is on disk. Leaves nothing behind if that fails."""
    temporary = f"writing-{secrets.token_hex(16)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        try:
            for part in (memoryview(head), data):
                at = 0
                while at < len(part):
                    at += os.write(fd, part[at : at + PIECE])
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
