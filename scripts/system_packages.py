"""System packages that tests and engines need: found, installed if possible, otherwise named.

On Debian and Ubuntu, root gets the packages from apt. Other users there get libraries, but no commands, in a folder of
``.venv``; nothing outside it changes. Elsewhere a message says what to install. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from run_command import run_command

APT_SECONDS = 300.0
APT = ["apt-get", "-o", "Acquire::Retries=2", "-o", "Acquire::http::Timeout=20", "-o", "DPkg::Lock::Timeout=60"]
INSTALL = ["install", "-y", "--no-install-recommends"]


class Need(NamedTuple):
    """A command, or a shared library by its linker name, with its Debian package and what needs it."""

    name: str
    package: str
    why: str

    @property
    def is_library(self) -> bool:
        return ".so" in self.name


ENGINE = "the Mooncake engine loads it"
LIBRARIES = (
    Need("libibverbs.so.1", "libibverbs1", ENGINE),
    Need("libnuma.so.1", "libnuma1", ENGINE),
    Need("libcurl.so.4", "libcurl4", ENGINE),
)
COMMANDS = (
    Need("curl", "curl", "a test resumes a download with it"),
    Need("wget", "wget", "a test resumes a download with it"),
)
BROWSER = (Need("chromium", "chromium", "the tests of the live page open it in this browser"),)


def provide(needs: Sequence[Need], folder: Path | None = None) -> None:
    """Makes sure that all ``needs`` are present. Otherwise ends the process with a message that says what to install.

    Args:
        needs: Commands and libraries.
        folder: Where to put libraries that only root could install; their user looks there as well.
    """
    missing = absent(folder, needs)
    if not missing:
        return
    print(f"installing {', '.join(need.package for need in missing)}", flush=True)
    output = ""
    if shutil.which("apt-get"):
        output = install(missing) if os.geteuid() == 0 else fetch([need for need in missing if need.is_library], folder)
    if missing := absent(folder, needs):
        print(output, file=sys.stderr)
        sys.exit("\n".join(["This machine lacks the following, and it could not be installed:", *told(missing)]))


def absent(folder: Path | None, needs: Sequence[Need]) -> list[Need]:
    """Returns the needs that are missing."""
    return [need for need in needs if not (_loads(need.name, folder) if need.is_library else shutil.which(need.name))]


def told(missing: Sequence[Need]) -> list[str]:
    """Returns one line for each need, and what to do."""
    packages = " ".join(need.package for need in missing)
    return [
        *(f"  {need.name}: {need.why}" for need in missing),
        f"On Debian and Ubuntu: apt-get update && apt-get install {packages}",
        "On other systems the packages have similar names. Then run the same command again.",
    ]


def install(needs: Sequence[Need]) -> str:
    """Installs packages with apt, as root. Returns its output; the caller checks what is present afterwards."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    update = run_command([*APT, "update"], env, APT_SECONDS)
    if update.returncode:  # possibly one index of many, and not the one that matters
        print("  apt-get update failed; trying with the present indexes", flush=True)
    return run_command([*APT, *INSTALL, *(need.package for need in needs)], env, APT_SECONDS).tail


def fetch(needs: Sequence[Need], folder: Path | None) -> str:
    """Downloads packages with their dependencies, as any user, and copies their libraries to ``folder``."""
    if not needs or folder is None:
        return ""
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch)
        for place in ("lists/partial", "cache/archives/partial"):
            (own / place).mkdir(parents=True)
        apt = [
            *APT,
            "-o",
            f"Dir::State::lists={own}/lists",
            "-o",
            f"Dir::Cache={own}/cache",
            "-o",
            "Debug::NoLocking=1",
        ]
        run_command([*apt, "update"], os.environ, APT_SECONDS)
        packages = [need.package for need in needs]
        outcome = run_command([*apt, *INSTALL, "--download-only", *packages], os.environ, APT_SECONDS)
        for archive in sorted((own / "cache/archives").glob("*.deb")):
            run_command(["dpkg-deb", "-x", str(archive), str(own / "files")], os.environ, APT_SECONDS)
        folder.mkdir(parents=True, exist_ok=True)
        for library in (own / "files").rglob("*.so.*"):
            if library.is_file():
                shutil.copyfile(library, folder / library.name)  # follows links, keeps their names
    return outcome.tail


def _loads(name: str, folder: Path | None) -> bool:
    if folder is not None and (folder / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
