"""Files found, read and written: which there are to migrate, and what is left alone and why."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .words import MENTIONS

PYTHON = frozenset({".py", ".pyi"})
TEXT = frozenset(
    {".sh", ".bash", ".zsh", ".ksh", ".fish", ".ps1", ".yaml", ".yml", ".md", ".rst", ".txt", ".json", ".toml", ".cfg"}
    | {".conf", ".ini", ".mk", ".j2", ".tf", ".service", ".env"}
)
TEXT_NAMES = frozenset({"Makefile", "Dockerfile", "Justfile", "Jenkinsfile", ".bashrc", ".bash_aliases", ".zshrc"})
SKIPPED_FOLDERS = frozenset(
    {".git", ".hg", ".svn", ".venv", "venv", "node_modules", "site-packages", "__pycache__", ".tox", ".nox", ".eggs"}
    | {".mypy_cache", ".ruff_cache", ".pytest_cache"}
)
MAX_BYTES = 4 << 20
"""A larger file is no source of anybody's; it is reported if it mentions an old word."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file that mentions an old word."""

    path: Path
    data: bytes

    @property
    def is_python(self) -> bool:
        return kind(self.path) is PYTHON


@dataclass(frozen=True, slots=True)
class Left:
    """A file that could not be handled and is as it was."""

    path: Path
    reason: str


def kind(path: Path) -> frozenset[str] | None:
    """:data:`PYTHON`, :data:`TEXT`, or None for a file that is nobody's here. Without a suffix, its first line says."""
    if path.suffix in PYTHON:
        return PYTHON
    if path.suffix in TEXT or path.name in TEXT_NAMES:
        return TEXT
    return None if path.suffix else _by_first_line(path)


def walk(paths: Iterable[Path], unread: list[Left]) -> Iterator[Path]:
    """Every file below the paths that may be migrated, once, in order. Links inside folders are not followed: what
    they lead to is migrated where it lies. A path that is given is followed, whatever its name.

    :param unread: gets the folders that cannot be read.
    """
    seen: set[Path] = set()
    for path in paths:
        real = path.resolve()
        for file in [real] if real.is_file() else _below(real, unread):
            if file not in seen:
                seen.add(file)
                yield file if path.is_symlink() else path / file.relative_to(real)


def own_modules(files: Iterable[Path]) -> frozenset[str]:
    """The names under which the user's own modules may be imported: every package folder and module there is."""
    names = {file.stem for file in files if file.suffix in PYTHON}
    packages = {file.resolve().parent for file in files if file.name == "__init__.py"}
    return frozenset(names | {package.name for package in packages})


def look(path: Path) -> Found | Left | None:
    """The file if it mentions an old word."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return Left(path, f"{size} bytes; the limit is {MAX_BYTES}") if _mentions(path) else None
        data = path.read_bytes()
    except OSError as error:
        return Left(path, error.strerror or str(error))
    if not MENTIONS.search(data):
        return None
    if b"\0" in data:
        return Left(path, "not text in an encoding that is read here")
    return Found(path, data)


def replace(found: Found, data: bytes) -> Left | None:
    """Puts ``data`` in the place of what was found, all or nothing, with its owner and mode; says why if not."""
    path = found.path.resolve()
    try:
        if path.read_bytes() != found.data:
            return Left(found.path, "it has changed meanwhile; run the command again")
        was = path.stat()
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                os.fchown(file.fileno(), was.st_uid, was.st_gid)
                os.fchmod(file.fileno(), was.st_mode & 0o7777)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        return Left(found.path, error.strerror or str(error))
    return None


def _below(folder: Path, unread: list[Left]) -> Iterator[Path]:
    def cannot(error: OSError) -> None:
        unread.append(Left(Path(error.filename), error.strerror or str(error)))

    for here, folders, files in os.walk(folder, onerror=cannot):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(files):
            file = Path(here, name)
            if not file.is_symlink() and file.is_file() and kind(file) is not None:
                yield file


def _by_first_line(path: Path) -> frozenset[str] | None:
    try:
        with path.open("rb") as file:
            line = file.readline(200)
    except OSError:
        return TEXT  # reading it again says what is wrong
    if not line.startswith(b"#!"):
        return None
    return PYTHON if b"python" in line else TEXT


def _mentions(path: Path) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return MENTIONS.search(data) is not None
