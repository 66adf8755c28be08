"""What the tests need of the system beside Python: looked for, fetched where that can be done, or else named.

Root of a Debian or Ubuntu gets the packages from apt. Anybody else there gets libraries (no commands) into a folder of
``.venv``, with nothing changed outside it. Elsewhere a sentence says what to install. Only the standard library.
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
    """``name``: of a command, or of a shared library as the linker asks for it; ``package``: Debian's."""

    name: str
    package: str
    why: str

    @property
    def is_library(self) -> bool:
        return ".so" in self.name


ENGINE = "the Mooncake engine loads it"
NEEDS = (
    Need("libibverbs.so.1", "libibverbs1", ENGINE),
    Need("libnuma.so.1", "libnuma1", ENGINE),
    Need("libcurl.so.4", "libcurl4", ENGINE),
    Need("curl", "curl", "a test resumes a download with it"),
    Need("wget", "wget", "a test resumes a download with it"),
)


def provide(folder: Path, needs: Sequence[Need] = NEEDS) -> None:
    """Sees to it that all ``needs`` are there. Ends the process with what to install if they cannot be had.

    :param folder: where libraries are put that cannot be installed; the libraries' user looks there too.
    """
    missing = absent(folder, needs)
    if not missing:
        return
    print(f"installing {', '.join(need.package for need in missing)}", flush=True)
    output = ""
    if shutil.which("apt-get"):
        output = install(missing) if os.geteuid() == 0 else fetch([n for n in missing if n.is_library], folder)
    if missing := absent(folder, needs):
        print(output, file=sys.stderr)
        sys.exit("\n".join(["The tests need what this machine lacks, and it could not be installed:", *told(missing)]))


def absent(folder: Path, needs: Sequence[Need]) -> list[Need]:
    """Those of ``needs`` that are not there."""
    return [need for need in needs if not (_loads(need.name, folder) if need.is_library else shutil.which(need.name))]


def told(missing: Sequence[Need]) -> list[str]:
    """One line each, and what to do."""
    packages = " ".join(need.package for need in missing)
    return [
        *(f"  {need.name}: {need.why}" for need in missing),
        f"On Debian and Ubuntu: apt-get update && apt-get install {packages}",
        "Elsewhere packages of much the same names have them. Then run the same command again.",
    ]


def install(needs: Sequence[Need]) -> str:
    """By root, for everybody. The output of apt; whether it has helped is seen by looking."""
    env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    update = run_command([*APT, "update"], env, APT_SECONDS)
    if update.returncode:  # perhaps one index of many, and not the one that matters
        print("  apt-get update failed; trying with the indexes there are", flush=True)
    return run_command([*APT, *INSTALL, *(need.package for need in needs)], env, APT_SECONDS).tail


def fetch(needs: Sequence[Need], folder: Path) -> str:
    """By anybody: downloads packages with what they need in turn, and copies the libraries in them into ``folder``."""
    if not needs:
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
                shutil.copyfile(library, folder / library.name)  # what a link stands for, under the link's name
    return outcome.tail


def _loads(name: str, folder: Path) -> bool:
    if (folder / name).exists():
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
