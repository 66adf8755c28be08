"""A folder of embeddings under faults: of every file operation, of other processes, of the file system."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embferry.cache import folder as module
from embferry.cache.contract import TooLarge
from embferry.cache.entry import Damaged, Entry
from embferry.cache.folder import LEFT_OVER_S, FolderStore

from .samples import ROOMY, file_bytes, found, has, keep, key_of, opened, path_of, sample

OPERATIONS = (
    "open", "mkdir", "fstat", "stat", "pread", "preadv", "write", "fsync", "rename", "unlink", "utime", "close",
    "scandir",
)  # fmt: skip


class Faults:
    """The operations of the ``os`` module, the n-th of which fails.

    Attributes:
        calls: Their names, in order.
    """

    def __init__(self, code: int = errno.EIO, at: int | None = None) -> None:
        self.calls: list[str] = []
        self._code, self._at = code, at

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in OPERATIONS:
            return real

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == self._at:
                if name == "close":
                    real(*arguments, **options)
                raise OSError(self._code, os.strerror(self._code))
            return real(*arguments, **options)

        return call


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_c(store: FolderStore) -> object:
    return keep(store, "c")


def read_a(store: FolderStore) -> object:
    return has(store, "a")


def read_damaged(store: FolderStore) -> object:
    try:
        return has(store, "damaged")
    except Damaged:
        return False


def prepared(folder: Path) -> FolderStore:
    """Returns a store with the embeddings a, b and a damaged one, in which writing c evicts."""
    for name in ("damaged", "a", "b"):
        keep(opened(folder), name)
    path_of(folder / "cache", "damaged").write_bytes(b"x" * file_bytes("damaged"))
    for at, name in enumerate(("b", "a", "damaged")):
        os.utime(path_of(folder / "cache", name), (at, at))
    return opened(folder, 3 * file_bytes("a"))


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("act", [write_c, read_a, read_damaged], ids=lambda act: act.__name__)
def test_a_fault_of_any_file_operation_costs_one_embedding(
    act: Callable[[FolderStore], object], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing wrong is read and nothing half-written has a name. The next call works."""
    watched = Faults()
    (tmp_path / "watched").mkdir()
    store = prepared(tmp_path / "watched")
    with monkeypatch.context() as patch:
        patch.setattr(module, "os", watched)
        act(store)
    assert len(watched.calls) > 3
    for at, name in enumerate(watched.calls):
        folder = tmp_path / str(at)
        folder.mkdir()
        store = prepared(folder)
        faults = Faults(code, at)
        with monkeypatch.context() as patch:
            patch.setattr(module, "os", faults)
            with suppress(OSError):
                act(store)
        assert faults.calls[: at + 1] == watched.calls[: at + 1]
        left = [name for name in names(folder / "cache") if name.startswith("writing-")]
        assert not left or faults.calls.count("unlink") > 1
        for known in ("a", "b", "c"):
            has(store, known)  # right, or missing
        assert read_damaged(store) is False
        keep(store, "d")
        assert has(store, "d"), f"after a fault of {name}, call {at}"


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, real = opened(tmp_path), os.write
    keep(store, "a")

    def write(fd: int, data: memoryview) -> int:
        if os.fstat(fd).st_size + len(data) > 500:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "write", write)
        with pytest.raises(OSError, match="No space"):
            keep(store, "b")
    assert names(tmp_path / "cache") == [path_of(tmp_path, "a").name]


def test_a_folder_that_is_only_read_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(opened(tmp_path), "a")
    path_of(tmp_path / "cache", "b").write_bytes(b"damaged")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("unlink", "utime", "rename", "mkdir"):
        monkeypatch.setattr(module.os, name, refuse)
    real = os.open

    def open_to_read(path: Any, flags: int, *more: Any, **folder: Any) -> Any:
        return (refuse if flags & os.O_CREAT else real)(path, flags, *more, **folder)

    monkeypatch.setattr(module.os, "open", open_to_read)
    store = opened(tmp_path)
    assert has(store, "a")
    for _ in range(2):  # it cannot be removed, and is as good as missing
        with pytest.raises(Damaged):
            found(store, "b")
    with pytest.raises(OSError, match="Read-only"):
        keep(store, "c")
    assert keep(store, "a") == 0


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, "a")
    os.rename(tmp_path / "cache", tmp_path / "gone")
    assert not has(store, "a")
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    keep(store, "b")
    assert has(store, "b")
    os.rename(tmp_path, tmp_path.with_name("all-gone"))
    with pytest.raises(FileNotFoundError):
        has(store, "b")
    with pytest.raises(FileNotFoundError):
        keep(store, "c")


def test_nobody_else_can_use_what_it_makes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keep(opened(tmp_path), "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(tmp_path / "cache", "a").stat().st_mode) == 0o600


def test_the_folder_may_be_a_symbolic_link(tmp_path: Path) -> None:
    keep(opened(tmp_path), "a")
    os.symlink(tmp_path / "cache", tmp_path / "link")
    assert has(FolderStore(tmp_path / "link", ROOMY), "a")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/nowhere", path)])
def test_a_name_may_belong_to_something_else(make: Callable[[Path], None], tmp_path: Path) -> None:
    store = opened(tmp_path, 3 * file_bytes("a"))
    make(path_of(tmp_path / "cache", "a"))
    with pytest.raises(Damaged):
        found(store, "a")
    for name in "bcdef":
        keep(store, name)
    assert has(store, "f")


def test_the_path_may_be_no_folder(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(NotADirectoryError):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError):
        FolderStore(tmp_path / "missing" / "cache", ROOMY)


def test_an_embedding_larger_than_the_folder_evicts_nothing(tmp_path: Path) -> None:
    store = opened(tmp_path, 2 * file_bytes("a"))
    keep(store, "a")
    with pytest.raises(TooLarge):
        keep(store, "large", 1000)
    assert has(store, "a")


def test_what_a_killed_process_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    opened(tmp_path)
    new, old = (tmp_path / "cache" / f"writing-{digit * 32}" for digit in "01")
    for path in (new, old):
        path.write_bytes(b"half")
    long_ago = os.stat(old).st_mtime - LEFT_OVER_S - 1
    os.utime(old, (long_ago, long_ago))
    store = opened(tmp_path)
    assert names(tmp_path / "cache") == [new.name]
    assert store.nbytes == 4  # it takes room until then


def test_files_that_are_being_written_count_for_the_bound(tmp_path: Path) -> None:
    keep(opened(tmp_path), "a")
    (tmp_path / "cache" / f"writing-{'0' * 32}").write_bytes(bytes(2 * file_bytes("a")))
    store = opened(tmp_path, 2 * file_bytes("a"))
    with pytest.raises(OSError, match="being written"):
        keep(store, "b")
    assert not has(store, "b")


def test_there_are_no_more_files_than_allowed(tmp_path: Path) -> None:
    store = opened(tmp_path, max_files=3)
    for name in range(10):
        keep(store, name)
        assert len(names(tmp_path / "cache")) <= 3


def test_writes_of_other_processes_are_seen_after_a_second(tmp_path: Path) -> None:
    now = [0.0]
    store = FolderStore(tmp_path / "cache", 4 * file_bytes("a"), clock=lambda: now[0])
    other = opened(tmp_path)
    for name in "abcd":
        keep(other, name)
    now[0] = 2.0
    keep(store, "e")
    assert len(names(tmp_path / "cache")) == 4


def test_an_error_of_the_reader_s_memory_is_no_fault_of_the_file(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, "a")

    def accept(entry: Entry) -> memoryview:
        raise MemoryError

    with pytest.raises(MemoryError):
        store.read(key_of("a"), accept)
    assert has(store, "a")


def test_an_embedding_of_another_shape_is_removed(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, "a")

    def accept(entry: Entry) -> memoryview:
        raise Damaged("wrong shape")

    with pytest.raises(Damaged):
        store.read(key_of("a"), accept)
    assert not has(store, "a")


def test_a_file_may_be_evicted_while_it_is_read(tmp_path: Path) -> None:
    store = opened(tmp_path)
    keep(store, "a")
    room = bytearray()

    def accept(entry: Entry) -> memoryview:
        store.remove(key_of("a"))
        room.extend(bytes(entry.nbytes))
        return memoryview(room)

    assert store.read(key_of("a"), accept) is not None
    assert bytes(room) == bytes(sample("a")[1])


names_of = st.sampled_from("abcdefgh")
steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "read", "other writes", "damage", "remove", "later"]), names_of, st.integers(1, 40)
    ),
    max_size=30,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    return (tmp_path_factory.mktemp("story") for _ in iter(int, 1))


@given(steps=steps)
def test_no_story_gives_a_wrong_answer_or_exceeds_the_bound(
    steps: list[tuple[str, str, int]], folders: Iterator[Path]
) -> None:
    """Two processes' stores on one folder. A store that is alone never exceeds the bound."""
    folder, now = next(folders), [0.0]
    bound = file_bytes("a", 60)
    store = FolderStore(folder / "cache", bound, clock=lambda: now[0])
    other = FolderStore(folder / "cache", bound, clock=lambda: now[0])
    is_alone = True
    for act, name, tokens in steps:
        path = path_of(folder / "cache", name)
        if act == "write":
            keep(store, name, 16)
            if is_alone:
                assert sum(each.stat().st_size for each in (folder / "cache").iterdir()) <= bound
        elif act == "other writes":
            is_alone = False
            keep(other, name, 16)
        elif act == "damage" and path.exists():
            raw = bytearray(path.read_bytes())
            raw[-tokens] ^= 255
            path.write_bytes(raw)
        elif act == "remove":
            store.remove(key_of(name))
        elif act == "later":
            now[0] += 60.0
        else:
            try:
                has(store, name)
            except Damaged:
                assert not path.exists()
    now[0] += 60.0
    keep(store, "last")
    assert sum(each.stat().st_size for each in (folder / "cache").iterdir()) <= bound


def test_threads_may_share_a_store(tmp_path: Path) -> None:
    store = opened(tmp_path, 4 * file_bytes("a"))
    errors: list[Exception] = []

    def work(number: int) -> None:
        try:
            for at in range(40):
                keep(store, (at + number) % 8)
                has(store, at % 8)
        except Exception as error:  # noqa: BLE001  (shown below)
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(names(tmp_path / "cache")) <= 4
